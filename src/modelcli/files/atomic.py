"""Replace a file or a folder in one step, so that a failure leaves the old one or the new one, complete."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from modelcli.errors import ModelcliError, RequestError, SystemFailureError
from modelcli.files import locks
from modelcli.files.open_folder import NO_SURPRISES, OpenFolder, path_of_handle, sync_folder
from modelcli.interrupts import asked_to_end

#: Whether files can be locked. Systems that have locks can rename an open file, too.
_HAS_LOCKS = sys.platform != "win32"

#: Whether the system can set mode and owner through an open handle.
_BY_HANDLE = os.chmod in os.supports_fd

#: Seconds to wait for another process that is about to replace the same file. Such a process holds its lock while the
#: disk writes; the limit is for a process that was stopped.
_PATIENCE = 60.0

#: The end of the name of a file or folder that is still being written.
TEMPORARY = ".modelcli-tmp"
_OWN = re.compile(rf"\..+\.[0-9a-f]{{8}}(\.old)?{re.escape(TEMPORARY)}", re.DOTALL)


def check_target(path: Path, *, force: bool, folder: bool = False, through_links: bool = True) -> None:
    """Raise an error if `path` cannot be written.

    Args:
        path: the file or folder to write.
        force: whether an existing one may be replaced.
        folder: whether the output is a folder.
        through_links: whether to replace the file that a link points to, not the link itself.

    Raises:
        RequestError: `path` exists and `force` is not set, or it has another kind than the output.
        SystemFailureError: the user may not write it.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except ValueError:
        raise RequestError(f"{str(path)!r} cannot be the name of a file", "a name cannot contain NUL") from None
    except OSError as error:
        raise _failure(path, error) from None
    if mode is not None:
        if stat.S_ISDIR(mode) and not folder:
            raise RequestError(f"{path} is a folder", f"name a file in it, or end it in a slash: {path}/")
        if folder and not stat.S_ISDIR(mode):
            raise RequestError(f"{path} is not a folder", "to write one file, name one: out.pth, out.safetensors")
        if not stat.S_ISREG(mode) and not folder:
            raise RequestError(f"{path} is a device or a pipe, not a file")
        if not force:
            raise RequestError(f"{path} exists", "--force replaces it")
        if folder:
            _check_folder(path)
        elif (through_links or not path.is_symlink()) and not os.access(path, os.W_OK):
            # A rename needs no write permission for the file, but users expect what `cp` and `torch.save` do.
            raise SystemFailureError(f"cannot write {path}: no permission to write it")
    above = _existing_folder(path)
    if not above.is_dir():
        raise RequestError(f"cannot write {path}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SystemFailureError(f"cannot write {path}: no permission to write in the folder {above}")


def _check_folder(path: Path) -> None:
    """Raise an error if an existing folder cannot be replaced in one step, or not by this user."""
    target = Path(os.path.realpath(path))
    inside = f"name a folder in it: {path / 'model'}/"
    if target.is_mount():
        raise RequestError(f"{path} is a mount point, which cannot be replaced in one step", inside)
    if target in (here := Path.cwd(), *here.parents):
        raise RequestError(f"{path} is the current folder or contains it, so it cannot be replaced in one step", inside)
    if not os.access(target, os.W_OK | os.X_OK):
        raise SystemFailureError(f"cannot write {path}: no permission to write in it")


def require_space(path: Path, nbytes: int, *, resumes: bool = False) -> None:
    """Raise SystemFailureError if the file system of `path` has no space for `nbytes` more bytes.

    The new file needs space of its own because the old one stays until the new one is complete. First removes what
    killed runs have left beside `path`; with `resumes` that stays, because it is taken over or removed later, and its
    space counts as free.
    """
    above = _existing_folder(path)
    target = Path(os.path.realpath(path))
    if not resumes:
        with contextlib.suppress(OSError):
            remove_abandoned(target)
    try:
        free = shutil.disk_usage(above).free
    except OSError:
        return
    if resumes:
        with contextlib.suppress(OSError):
            free += _size_of_abandoned(target)
    if nbytes > free:
        raise SystemFailureError(
            f"cannot write {path}: it takes {nbytes / 1e6:,.2f} MB, and {free / 1e6:,.2f} MB are free in {above}",
            "modelcli writes the whole new file before it replaces the old one",
        )


def _size_of_abandoned(target: Path) -> int:
    """Return the bytes on the disk of the temporary folders beside a target that no process has locked."""
    total = 0
    with OpenFolder(target.parent) as beside:
        for name, handle in _abandoned_folders(beside, target):
            for above, _, names in os.walk(path_of_handle(handle, beside.path / name)):
                statuses = (os.lstat(os.path.join(above, each)) for each in names)  # noqa: PTH118 -- as os.walk gives it
                total += sum(getattr(status, "st_blocks", status.st_size // 512) * 512 for status in statuses)
    return total


def _existing_folder(path: Path) -> Path:
    """Return the folder of `path`, or the nearest folder above it that exists."""
    folder = Path(os.path.realpath(path)).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def leave_to_disk(file: BinaryIO) -> None:
    """Flush the file to the disk and drop it from the page cache, so that the next read comes from the disk."""
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _NewFile(io.FileIO):
    """A new file whose `write` writes all the data or raises OSError.

    `io.FileIO.write` may write less, for example on a full disk, and reports that only in its return value.
    """

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        total, left = view.nbytes, view
        while left:
            taken = super().write(left)
            if not taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left = left[taken:]
        return total


@contextlib.contextmanager
def replacing(
    path: Path,
    *,
    force: bool,
    durable: bool = True,
    through_links: bool = True,
    is_locked: bool = False,
    require_unchanged: Callable[[], None] = lambda: None,
) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a new file beside `path`; at the end of the block the new file replaces `path`.

    The function creates missing parent folders. If the block raises, it removes the new file and leaves the old one as
    it was. It does not follow links that another program puts in the place of a folder or of the new file meanwhile.

    Args:
        path: the file to replace or create.
        force: whether an existing file may be replaced.
        durable: whether the new file must be on the disk before it replaces the old one, to survive a loss of power.
        through_links: whether to replace the file that a link points to, not the link itself.
        is_locked: whether the caller already holds the lock of `path`.
        require_unchanged: called when no other process can replace `path` any more, and before it is replaced; it
            raises if the sources of the new file have changed.

    Yields:
        The open file, and its path.

    Raises:
        RequestError, SystemFailureError: as `check_target`, or the system failed.
    """
    check_target(path, force=force, through_links=through_links)
    target = _resolved(path, through_links=through_links)

    def put(handle: int | None) -> None:
        with contextlib.nullcontext() if is_locked else _alone(folders[0], target.name):
            require_unchanged()
            if handle is not None:
                folders[0].require_same(temporary, handle)
            _be_like(folders[0], temporary, handle, target.name, 0o666)
            if not force and folders[0].status(target.name) is not None:
                raise RequestError(f"{path} appeared meanwhile", "--force replaces it")
            _heed_signals()
            _put(folders[0], temporary, target.name, path, folders if durable else ())
        _remove_file(folders[0], temporary)

    made: list[str] = []
    with _parents_of(target, path) as folders:
        try:
            with failing_as(path):
                with _new_file(folders[0], target, made) as file:
                    temporary = made[-1]
                    yield cast("BinaryIO", file), folders[0].path / temporary
                    if durable:
                        os.fsync(file.fileno())
                    if _HAS_LOCKS:  # the lock lasts until the file is closed, so no other run removes it as abandoned
                        put(file.fileno())
                if not _HAS_LOCKS:  # such a system cannot rename an open file
                    put(None)
        except BaseException:
            for temporary in made:
                _remove_file(folders[0], temporary)
            raise


@contextlib.contextmanager
def replacing_folder(
    path: Path,
    *,
    force: bool,
    durable: bool = True,
    superseded: Callable[[Path], Collection[str]] = lambda _: (),
    require_unchanged: Callable[[], None] = lambda: None,
    adopts: Callable[[Path], bool] | None = None,
    keeps: Callable[[Path, BaseException], bool] = lambda _folder, _error: False,
) -> Iterator[Path]:
    """Make a new folder beside `path`; at the end of the block the new folder replaces `path` in one step.

    Other files of the old folder (a tokenizer, a configuration) are kept in the new one.

    Args:
        path, force, durable, require_unchanged: as in `replacing`.
        superseded: a function that gets the old folder and returns the names of the files in it that the new ones
            replace; these are not kept.
        adopts: whether to go on with the temporary folder of an interrupted run, which is this user's own. The others
            are removed.
        keeps: whether to leave the new folder for another run if the block raises this error.

    Yields:
        The path of the new folder: a path through its open handle if the system allows, so that no other program can
        redirect what the block writes.
    """
    check_target(path, force=force, folder=True)
    target = _resolved(path)
    made: list[str] = []
    lock = None
    with _parents_of(target, path, removes=adopts is None) as folders:
        beside = folders[0]
        try:
            with failing_as(path):
                if adopts is not None:
                    lock = _adopted_folder(beside, target, adopts, made)
                    remove_abandoned(target, beside)
                if lock is None:
                    lock = _new_folder(beside, target, made)
                temporary = made[-1]
                new = path_of_handle(lock, beside.path / temporary)
                try:
                    yield new
                except BaseException as error:
                    if keeps(new, error):
                        made.remove(temporary)
                    raise
                with _alone(beside, target.name) as old:
                    require_unchanged()
                    if beside.status(target.name) is not None:
                        if not force:
                            raise RequestError(f"{path} appeared meanwhile", "--force replaces it")
                        held = path_of_handle(old, target)
                        _take_along(held, new, superseded(held), path)
                    if lock is not None:
                        beside.require_same(temporary, lock)
                    _be_like(beside, temporary, lock, target.name, 0o777)
                    if durable:
                        _sync_tree(new)
                    _heed_signals()
                    _put(beside, temporary, target.name, path, folders if durable else ())
        finally:
            # By now the temporary name belongs to the old folder, or to the new one if the exchange did not happen.
            for temporary in made:
                _remove_tree(beside, temporary)
            if lock is not None:
                os.close(lock)


@contextlib.contextmanager
def shared_folder(folder: Path, inode: int, path: Path) -> Iterator[Path]:
    """Open the new folder that another process has made beside `path` and keeps, to write files into it.

    Args:
        folder: the folder, with all links resolved.
        inode: its inode. Another folder in its place is refused.
        path: the folder that it will replace, for errors.

    Yields:
        The path of the folder, through its open handle if the system allows.
    """
    with failing_as(path):
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                handle = os.open(folder, os.O_RDONLY | NO_SURPRISES)
                break
            except FileNotFoundError:  # a network file system shows a new folder after a moment
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            except PermissionError:  # the system cannot open folders
                if os.name != "nt":
                    raise
                yield folder
                return
        try:
            if os.fstat(handle).st_ino != inode:
                raise OSError(errno.ESTALE, f"another program has put something else in the place of {folder}")
            yield path_of_handle(handle, folder)
        finally:
            os.close(handle)


def _resolved(path: Path, *, through_links: bool = True) -> Path:
    """Return `path` with all links resolved; a link at its end only with `through_links`."""
    return Path(os.path.realpath(path)) if through_links else Path(os.path.realpath(path.parent)) / path.name


@contextlib.contextmanager
def _parents_of(target: Path, path: Path, *, removes: bool = True) -> Iterator[list[OpenFolder]]:
    """Make the missing parent folders of a target; if the block raises, remove them again, if they are empty.

    With `removes`, what killed runs have left beside the target is removed first.

    Yields the open folders that get a new entry, the target's own folder first.
    """
    made: list[tuple[OpenFolder, str]] = []
    with contextlib.ExitStack() as opened:
        try:
            with failing_as(path):
                above, missing = target.parent, []
                while not above.exists():
                    missing.append(above.name)
                    above = above.parent
                folders = [opened.enter_context(OpenFolder(above))]
                while missing:
                    name = missing.pop()
                    with contextlib.suppress(FileExistsError):
                        folders[0].make(name, 0o777)
                        made.append((folders[0], name))
                    folders.insert(0, opened.enter_context(folders[0].folder(name)))
                if removes:
                    remove_abandoned(target, folders[0])
            yield folders
        except BaseException:
            for folder, name in reversed(made):
                with contextlib.suppress(OSError):
                    folder.remove_empty(name)
            raise


@contextlib.contextmanager
def _alone(folder: OpenFolder, name: str) -> Iterator[int | None]:
    """Hold the lock of the file or folder `name`, if it exists, so that two processes replace it one after the other.

    Yields its open handle. For the process that waited, `require_unchanged` then reports the change.
    """
    handle = None
    try:
        with contextlib.suppress(OSError):
            handle = folder.open(name, os.O_RDONLY)
            deadline = time.monotonic() + _PATIENCE
            while not locks.try_to_lock(handle) and time.monotonic() < deadline:
                time.sleep(0.01)
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


def _put(folder: OpenFolder, new: str, target: str, path: Path, folders: Iterable[OpenFolder]) -> None:
    """Rename `new` to `target` in one step, and flush the entries of `folders` to the disk.

    The old target is called `new` afterwards, or is gone. If the flush fails, the names are changed back.
    """
    there = folder.status(target)
    exchanged = there is not None and _exchange(folder, new, target)
    if not exchanged and there is not None and stat.S_ISDIR(there.st_mode):
        _move_in_two_steps(folder, new, target)
    elif not exchanged:
        folder.replace(new, target)
    try:
        for each in folders:
            each.sync()
    except OSError as error:
        if exchanged and _exchange(folder, new, target):
            raise
        if there is None:
            folder.rename(target, new)
            raise
        raise SystemFailureError(
            f"{path} was written, but it may not survive a loss of power: {error.strerror or error}"
        ) from None


def _be_like(folder: OpenFolder, new: str, handle: int | None, old: str, mode: int) -> None:
    """Give `new` the mode and owner of `old`, as far as this user may; without `old`, `mode` less the umask.

    Uses the open handle, because another program may have given the name to another file. Uses the name only if the
    system has no other way.
    """
    status = folder.status(old)
    new_one: int | Path = handle if handle is not None and _BY_HANDLE else folder.path / new
    if status is None or stat.S_ISLNK(status.st_mode):
        os.chmod(new_one, mode & ~_umask())  # noqa: PTH101 -- a Path has no open handle
        return
    if hasattr(os, "chown") and (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(OSError):
            os.chown(new_one, status.st_uid, status.st_gid)
    os.chmod(new_one, status.st_mode & (0o7777 if stat.S_ISDIR(status.st_mode) else 0o777))  # noqa: PTH101


def _heed_signals() -> None:
    """Raise KeyboardInterrupt if a signal to end the program came and its exception was lost."""
    if asked_to_end:
        raise KeyboardInterrupt


def _remove_file(folder: OpenFolder, name: str) -> None:
    """Remove a file if it still exists, with one retry. The next run removes what is left."""
    for _ in range(2):
        try:
            folder.remove(name)
            return
        except FileNotFoundError:
            return
        except OSError:
            continue


def _remove_tree(folder: OpenFolder, name: str) -> None:
    """Remove a folder if it still exists. A signal to end the program takes effect after that."""
    try:
        folder.remove_tree(name)
    except OSError:
        folder.remove_tree(name, ignore_errors=True)
    except BaseException:
        folder.remove_tree(name, ignore_errors=True)
        raise


def _take_along(old: Path, new: Path, superseded: Collection[str], path: Path) -> None:
    """Keep the other files of the old folder in the new one, as hard links or copies.

    `path` is the user's name of the folder, for error messages.
    """
    for entry in sorted(old.iterdir()):
        if entry.name in superseded or _OWN.fullmatch(entry.name) or (new / entry.name).exists():
            continue
        try:
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
            else:
                _link_or_copy(entry, new / entry.name)
        except OSError as error:
            raise SystemFailureError(f"cannot keep {path / entry.name}: {error.strerror or error}") from None


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _move_in_two_steps(folder: OpenFolder, new: str, target: str) -> None:
    """Replace a folder by two renames, if the system cannot exchange names.

    The caller holds the lock of the old folder. Otherwise another run could believe that this run was killed between
    the two renames.
    """
    old = f".{_stem(target)}.{os.urandom(4).hex()}.old{TEMPORARY}"
    folder.rename(target, old)
    try:
        folder.rename(new, target)
    except BaseException:
        folder.rename(old, target)
        raise
    _remove_tree(folder, old)


def _exchange(folder: OpenFolder, one: str, other: str) -> bool:
    """Exchange two names in one step. Returns False if the system cannot."""
    return folder.exchange(one, other)


# --- temporary files -----------------------------------------------------------------------------------------------


def _new_file(folder: OpenFolder, target: Path, made: list[str]) -> _NewFile:
    """Create a new file beside `target`. Its lock lasts while it is open, so other runs see that it is in use.

    The name is added to `made` before the file exists, so that an interrupted run knows what to remove.
    """
    while True:
        made.append(_temporary_name(target))
        try:
            handle = folder.open(made[-1], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            made.pop()
            continue
        file = _NewFile(handle, "w+b")
        if locks.try_to_lock(handle) and os.fstat(handle).st_nlink:
            return file
        file.close()  # another process removed it as abandoned before it was locked


def _new_folder(folder: OpenFolder, target: Path, made: list[str]) -> int | None:
    """Make a new folder beside `target`. Returns its locked handle, or None if the system cannot open folders."""
    while True:
        made.append(_temporary_name(target))
        try:
            folder.make(made[-1], 0o700)
        except FileExistsError:
            made.pop()
            continue
        try:
            handle = folder.open(made[-1], os.O_RDONLY)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        if locks.try_to_lock(handle) and folder.status(made[-1]) is not None:
            return handle
        os.close(handle)


def _temporary_name(target: Path) -> str:
    return f".{_stem(target.name)}.{os.urandom(4).hex()}{TEMPORARY}"


def _stem(name: str) -> str:
    """Return the name, shortened and with a hash if the temporary name would exceed the system's limit in bytes."""
    if len(os.fsencode(name)) <= 100:
        return name
    import hashlib  # hardly any name is so long

    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    name = name[:83]
    while len(os.fsencode(name)) > 83:
        name = name[:-1]
    return f"{name}-{digest}"


def remove_abandoned(target: Path, folder: OpenFolder | None = None) -> None:
    """Remove the temporary files and folders that killed runs have left beside `target`.

    Such a file has exactly the temporary name of `target`, and no process holds its lock. The function touches files
    and folders only, never a pipe or a link of that name.
    """
    if folder is None:
        with OpenFolder(target.parent) as folder:
            remove_abandoned(target, folder)
        return
    own = _name_of_temporary(target)
    for name in folder.names():
        if (match := own.fullmatch(name)) is not None:
            with contextlib.suppress(OSError):
                _remove_if_free(folder, name, back_to=target.name if match[1] else None)


def _name_of_temporary(target: Path) -> re.Pattern[str]:
    """Return the pattern of the names of temporary files and folders of a target; a group is of an old folder."""
    return re.compile(rf"\.{re.escape(_stem(target.name))}\.[0-9a-f]{{8}}(\.old)?{re.escape(TEMPORARY)}")


def temporary_beside(target: Path, name: str) -> Path:
    """Return the path of the temporary folder of a target that another process says it has made.

    Raises OSError for a name that is not one of such a folder.
    """
    if not _name_of_temporary(target).fullmatch(name):
        raise OSError(errno.EINVAL, f"{name!r} is no temporary folder of {target}")
    return target.parent / name


def _abandoned_folders(folder: OpenFolder, target: Path) -> Iterator[tuple[str, int]]:
    """Yield the new folders that killed runs of this user have left beside a target, each with its locked handle.

    Only the user may write in such a folder, so that what it holds was not put there by anybody else. The handle is
    closed afterwards. Systems that cannot open folders have none.
    """
    own = _name_of_temporary(target)
    for name in sorted(folder.names()):
        if (match := own.fullmatch(name)) is None or match[1]:
            continue
        try:
            handle = folder.open(name, os.O_RDONLY)
        except OSError:
            continue
        try:
            status = os.fstat(handle)
            is_own = not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)
            if stat.S_ISDIR(status.st_mode) and is_own and locks.try_to_lock(handle):
                folder.require_same(name, handle)
                yield name, handle
        except OSError:
            continue
        finally:
            os.close(handle)


def _adopted_folder(folder: OpenFolder, target: Path, adopts: Callable[[Path], bool], made: list[str]) -> int | None:
    """Return the locked handle of the first temporary folder that `adopts` accepts, and add its name to `made`."""
    for name, handle in _abandoned_folders(folder, target):
        if adopts(path_of_handle(handle, folder.path / name)):
            made.append(name)
            return os.dup(handle)  # the lock belongs to both, and lasts as long as one of them is open
    return None


def remove_of_dead(target: Path, temporary: Path, patience: float = 3.0) -> None:
    """Remove the temporary folder of a process that has just died, once the system has given its lock back."""
    deadline = time.monotonic() + patience
    while os.path.lexists(temporary) and time.monotonic() < deadline:
        remove_abandoned(target)
        time.sleep(0.05)


def _remove_if_free(folder: OpenFolder, name: str, back_to: str | None = None) -> None:
    """Remove a file or folder that no process has locked.

    A folder of a run that was killed between two renames gets its own name `back_to` again instead.
    """
    handle = folder.open(name, os.O_RDONLY)
    try:
        mode = os.fstat(handle).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or not locks.try_to_lock(handle):
            return
        folder.require_same(name, handle)
        if back_to is not None and stat.S_ISDIR(mode) and folder.status(back_to) is None:
            folder.rename(name, back_to)
        elif stat.S_ISDIR(mode):
            folder.remove_tree(name)
        else:
            folder.remove(name)
    finally:
        os.close(handle)


# --- errors, modes, durability -------------------------------------------------------------------------------------


@contextlib.contextmanager
def failing_as(path: Path) -> Iterator[None]:
    """Report an OSError of the block as a failure to write `path`."""
    try:
        yield
    except ModelcliError:
        raise
    except OSError as error:
        raise _failure(path, error) from None


def _failure(path: Path, error: OSError) -> SystemFailureError:
    failure = SystemFailureError(f"cannot write {path}: {error.strerror or error}")
    failure.notes = tuple(getattr(error, "__notes__", ()))
    return failure


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_tree(folder: Path) -> None:
    """Flush every file of a folder, and the folder itself, to the disk."""
    for above, _, names in os.walk(folder):
        for name in names:
            entry = os.path.join(above, name)  # noqa: PTH118 -- as os.walk gives it
            if stat.S_ISREG(os.lstat(entry).st_mode):
                with contextlib.suppress(PermissionError):
                    handle = os.open(entry, os.O_RDONLY | NO_SURPRISES)
                    try:
                        os.fsync(handle)
                    finally:
                        os.close(handle)
    sync_folder(folder)
