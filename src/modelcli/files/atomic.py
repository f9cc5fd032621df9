"""Replacing a file or a folder in one step: whatever happens on the way, the old one or the new one is there, whole."""

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

#: Whether a file can be locked, as it can where an open one can be renamed.
_HAS_LOCKS = sys.platform != "win32"

#: Whether mode and owner can be set by an open handle.
_BY_HANDLE = os.chmod in os.supports_fd

#: Seconds that another process is waited for that is about to replace the same file. It holds its lock for as long as
#: the disk takes to write, and nobody waits for one that was stopped.
_PATIENCE = 60.0

#: How the name ends of a file or folder that is still being written.
TEMPORARY = ".modelcli-tmp"
_OWN = re.compile(rf"\..+\.[0-9a-f]{{8}}(\.old)?{re.escape(TEMPORARY)}", re.DOTALL)


def check_target(path: Path, *, force: bool, folder: bool = False, through_links: bool = True) -> None:
    """Raise where `path` cannot be written: it is there and `force` is not set, of another kind, or read-only."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except ValueError:
        raise RequestError(f"no file can be called {str(path)!r}", "a name holds no NUL") from None
    except OSError as error:
        raise _failure(path, error) from None
    if mode is not None:
        if stat.S_ISDIR(mode) and not folder:
            raise RequestError(f"{path} is a folder", f"name a file in it, or end it in a slash: {path}/")
        if folder and not stat.S_ISDIR(mode):
            raise RequestError(f"{path} is not a folder", "end the name in .pth or .safetensors to write one file")
        if not stat.S_ISREG(mode) and not folder:
            raise RequestError(f"{path} is a device or a pipe, not a file")
        if not force:
            raise RequestError(f"{path} exists", "--force replaces it")
        if folder:
            _check_folder(path)
        elif (through_links or not path.is_symlink()) and not os.access(path, os.W_OK):
            # A rename would not ask for it, but `cp` and `torch.save` do.
            raise SystemFailureError(f"cannot write {path}: no permission to write it")
    above = _existing_folder(path)
    if not above.is_dir():
        raise RequestError(f"cannot write {path}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SystemFailureError(f"cannot write {path}: no permission to write in the folder {above}")


def _check_folder(path: Path) -> None:
    """Raise where an existing folder cannot be replaced in one step, or not by this user."""
    target = Path(os.path.realpath(path))
    inside = f"name a folder in it: {path / 'model'}/"
    if target.is_mount():
        raise RequestError(f"{path} is where a file system is mounted, and cannot be replaced in one step", inside)
    if target in (here := Path.cwd(), *here.parents):
        raise RequestError(f"{path} is the current folder or one above it, and cannot be replaced in one step", inside)
    if not os.access(target, os.W_OK | os.X_OK):
        raise SystemFailureError(f"cannot write {path}: no permission to write in it")


def require_space(path: Path, nbytes: int) -> None:
    """Raise SystemFailureError where `nbytes` do not fit beside `path`; the old file is there until the new one is.

    What runs that were killed have left there takes no space any more: it is removed.
    """
    above = _existing_folder(path)
    with contextlib.suppress(OSError):
        remove_abandoned(Path(os.path.realpath(path)))
    try:
        free = shutil.disk_usage(above).free
    except OSError:
        return
    if nbytes > free:
        raise SystemFailureError(
            f"cannot write {path}: it takes {nbytes / 1e6:,.2f} MB, and {free / 1e6:,.2f} MB are free in {above}",
            "the new file is written whole before it takes the place of an old one",
        )


def _existing_folder(path: Path) -> Path:
    """The folder that a path lies in, or the nearest one above it that exists."""
    folder = Path(os.path.realpath(path)).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def leave_to_disk(file: BinaryIO) -> None:
    """Put what was written on the disk, and where the system does that out of memory: it is read from there next."""
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _NewFile(io.FileIO):
    """A new file, each write of which is whole: an unbuffered file may take less than it was given, and say so only in
    what it returns, as it does where the disk is full."""

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
    """Give a new file beside `path`; at the end of the block it takes the place of `path`.

    With `durable` it is on the disk by then, so that a loss of power cannot take it away.

    The parent folder is made. Where the block raises, the new file is removed and the old one is as it was. A link is
    followed: the file that it points to is replaced; without `through_links` it is replaced itself. Links that somebody
    puts in the place of a folder or of the new file in the meantime are not followed.

    `require_unchanged` is called when nobody else can replace `path` any more, and before it is replaced: it raises
    where what the new file was made of is another one by now. `is_locked` says that the caller holds the lock of `path`
    already.
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
                raise RequestError(f"{path} exists by now", "--force replaces it")
            _heed_signals()
            _put(folders[0], temporary, target.name, path, folders if durable else ())
        _remove_file(folders[0], temporary)

    made: list[str] = []
    with _parents_of(target, path) as folders:
        try:
            with _failing_as(path):
                with _new_file(folders[0], target, made) as file:
                    temporary = made[-1]
                    yield cast("BinaryIO", file), folders[0].path / temporary
                    if durable:
                        os.fsync(file.fileno())
                    if _HAS_LOCKS:  # which hold until the file is closed: so nobody takes it for abandoned
                        put(file.fileno())
                if not _HAS_LOCKS:  # and open files cannot be renamed
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
) -> Iterator[Path]:
    """Give a new folder beside `path`; at the end of the block it takes the place of `path`, in one step.

    What else an old folder holds (a tokenizer, a configuration) goes along: `superseded` gives the names of the files
    in it that go, because what the block has written stands for them. `require_unchanged` is that of `replacing`.

    The folder is given by its open handle where the system can, so that what is written into it lands nowhere else.
    """
    check_target(path, force=force, folder=True)
    target = _resolved(path)
    made: list[str] = []
    lock = None
    with _parents_of(target, path) as folders:
        beside = folders[0]
        try:
            with _failing_as(path):
                lock = _new_folder(beside, target, made)
                temporary = made[-1]
                new = path_of_handle(lock, beside.path / temporary)
                yield new
                with _alone(beside, target.name) as old:
                    require_unchanged()
                    if beside.status(target.name) is not None:
                        if not force:
                            raise RequestError(f"{path} exists by now", "--force replaces it")
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
            # What stands there now is the old folder, or the new one where it did not come to the swap.
            for temporary in made:
                _remove_tree(beside, temporary)
            if lock is not None:
                os.close(lock)


def _resolved(path: Path, *, through_links: bool = True) -> Path:
    """Where a path leads, links followed once and for all: the last one only with `through_links`."""
    return Path(os.path.realpath(path)) if through_links else Path(os.path.realpath(path.parent)) / path.name


@contextlib.contextmanager
def _parents_of(target: Path, path: Path) -> Iterator[list[OpenFolder]]:
    """Make the folders that a target lies in, for a block that puts it there; where it raises, they go again.

    Gives the folders in which there are new names then, the target's own first.
    """
    made: list[tuple[OpenFolder, str]] = []
    with contextlib.ExitStack() as opened:
        try:
            with _failing_as(path):
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
                remove_abandoned(target, folders[0])
            yield folders
        except BaseException:
            for folder, name in reversed(made):
                with contextlib.suppress(OSError):
                    folder.remove_empty(name)
            raise


@contextlib.contextmanager
def _alone(folder: OpenFolder, name: str) -> Iterator[int | None]:
    """Hold the lock of what has a name, if anything has, so that of two that replace it one comes after the other.

    Gives its open handle. Who waited finds another file there, and `require_unchanged` says so.
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
    """Give what is new the name of its target in one step, and put the names in `folders` on the disk.

    What had that name is called `new` then, or is gone. Where the disk refuses the names, they are taken back.
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
    """Give what is new the mode and owner of what it replaces, as far as this user may; else what the umask leaves.

    It is reached by its open handle, not by its name, which somebody else may have given to another file by now. A name
    is used where the system has no other way.
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
    """Raise KeyboardInterrupt where a signal to end the program came, and what it raised was lost."""
    if asked_to_end:
        raise KeyboardInterrupt


def _remove_file(folder: OpenFolder, name: str) -> None:
    """Remove a file where it is still there, at the second attempt if need be; what stays is the next run's."""
    for _ in range(2):
        try:
            folder.remove(name)
            return
        except FileNotFoundError:
            return
        except OSError:
            continue


def _remove_tree(folder: OpenFolder, name: str) -> None:
    """Remove a folder likewise, a signal to end the program put off until it is gone."""
    try:
        folder.remove_tree(name)
    except OSError:
        folder.remove_tree(name, ignore_errors=True)
    except BaseException:
        folder.remove_tree(name, ignore_errors=True)
        raise


def _take_along(old: Path, new: Path, superseded: Collection[str], path: Path) -> None:
    """Let a new folder have the other files of the old one: by a second name, or as copies.

    `path` is what the user calls the folder.
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
    """Put a folder in the place of another where the system cannot exchange their names.

    The caller holds the lock of the other one: else a run might take it for one that was killed between the two names.
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
    """Exchange two names in one step. False where the system cannot."""
    return folder.exchange(one, other)


# --- temporary files -----------------------------------------------------------------------------------------------


def _new_file(folder: OpenFolder, target: Path, made: list[str]) -> _NewFile:
    """A new file beside `target`, locked for as long as it is open: so others tell that it is being written.

    Its name joins `made` before it is there, so that whoever is interrupted knows what to remove.
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
        file.close()  # another process took it for abandoned before it was locked


def _new_folder(folder: OpenFolder, target: Path, made: list[str]) -> int | None:
    """A new folder beside `target`; gives its locked handle, where a folder can be opened."""
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
    """A name, or as much of it as leaves room for what tells a temporary one (systems count its bytes) and for what
    tells it from other long names."""
    if len(os.fsencode(name)) <= 100:
        return name
    import hashlib  # hardly any name is so long

    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    name = name[:83]
    while len(os.fsencode(name)) > 83:
        name = name[:-1]
    return f"{name}-{digest}"


def remove_abandoned(target: Path, folder: OpenFolder | None = None) -> None:
    """Remove what runs that were killed have left beside `target`: nobody holds its lock any more.

    Only what has exactly the name of a temporary file or folder of `target` is touched, and nothing but files and
    folders: never a pipe or a link of that name.
    """
    if folder is None:
        with OpenFolder(target.parent) as folder:
            remove_abandoned(target, folder)
        return
    own = re.compile(rf"\.{re.escape(_stem(target.name))}\.[0-9a-f]{{8}}(\.old)?{re.escape(TEMPORARY)}")
    for name in folder.names():
        if (match := own.fullmatch(name)) is not None:
            with contextlib.suppress(OSError):
                _remove_if_free(folder, name, back_to=target.name if match[1] else None)


def _remove_if_free(folder: OpenFolder, name: str, back_to: str | None = None) -> None:
    """Remove what nobody has locked; a folder whose run was killed between two names goes `back_to` its own."""
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
def _failing_as(path: Path) -> Iterator[None]:
    """Tell what the system refuses as a failure to write `path`."""
    try:
        yield
    except ModelcliError:
        raise
    except OSError as error:
        raise _failure(path, error) from None


def _failure(path: Path, error: OSError) -> SystemFailureError:
    return SystemFailureError(f"cannot write {path}: {error.strerror or error}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_tree(folder: Path) -> None:
    """Put every file of a folder on the disk, and the folder itself."""
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
