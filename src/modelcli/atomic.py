"""Replacing a file or a folder in one step: whatever happens on the way, the old one or the new one is there, whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from modelcli.errors import ModelcliError, RequestError, SystemFailureError

#: Signals to end the program that came. What a handler raises is lost where other code catches everything, as torch
#: does around an import: so it is asked again before something is replaced.
asked_to_end: list[int] = []

#: Whether a file can be locked, as it can where an open one can be renamed.
_HAS_LOCKS = sys.platform != "win32"

#: How the name ends of a file or folder that is still being written.
TEMPORARY = ".modelcli-tmp"


def check_target(path: Path, *, force: bool, folder: bool = False, through_links: bool = True) -> None:
    """Raise where `path` cannot be written: it is there and `force` is not set, of another kind, or read-only."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
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


@contextlib.contextmanager
def replacing(
    path: Path, *, force: bool, durable: bool = True, through_links: bool = True
) -> Iterator[tuple[BinaryIO, Path]]:
    """Give a new file beside `path`; at the end of the block it takes the place of `path`.

    With `durable` it is on the disk by then, so that a loss of power cannot take it away.

    The parent folder is made. Where the block raises, the new file is removed and the old one is as it was. A link is
    followed: the file that it points to is replaced; without `through_links` it is replaced itself.
    """
    check_target(path, force=force, through_links=through_links)
    target = Path(os.path.realpath(path)) if through_links else path

    def put() -> None:
        _be_like(temporary, target, 0o666)
        if not force and target.exists():
            raise RequestError(f"{path} exists by now", "--force replaces it")
        _heed_signals()
        _put(temporary, target, path, folders if durable else ())
        _remove_file(temporary)

    made: list[Path] = []
    with _parents_of(target, path) as folders:
        try:
            with _failing_as(path):
                with _new_file(target, made) as file:
                    temporary = made[-1]
                    yield file, temporary
                    file.flush()
                    if durable:
                        os.fsync(file.fileno())
                    if _HAS_LOCKS:  # which hold until the file is closed: so nobody takes it for abandoned
                        put()
                if not _HAS_LOCKS:  # and open files cannot be renamed
                    put()
        except BaseException:
            for temporary in made:
                _remove_file(temporary)
            raise


@contextlib.contextmanager
def replacing_folder(
    path: Path, *, force: bool, durable: bool = True, superseded: Callable[[Path], Collection[str]] = lambda _: ()
) -> Iterator[Path]:
    """Give a new folder beside `path`; at the end of the block it takes the place of `path`, in one step.

    What else an old folder holds (a tokenizer, a configuration) goes along: `superseded` gives the names of the files
    in it that go, because what the block has written stands for them.
    """
    check_target(path, force=force, folder=True)
    target = Path(os.path.realpath(path))
    made: list[Path] = []
    lock = None
    with _parents_of(target, path) as folders:
        try:
            with _failing_as(path):
                lock = _new_folder(target, made)
                temporary = made[-1]
                yield temporary
                if target.exists():
                    if not force:
                        raise RequestError(f"{path} exists by now", "--force replaces it")
                    _take_along(target, temporary, superseded(target))
                _be_like(temporary, target, 0o777)
                if durable:
                    _sync_tree(temporary)
                _heed_signals()
                _put(temporary, target, path, folders if durable else ())
        finally:
            # What stands there now is the old folder, or the new one where it did not come to the swap.
            for temporary in made:
                _remove_tree(temporary)
            if lock is not None:
                os.close(lock)


@contextlib.contextmanager
def _parents_of(target: Path, path: Path) -> Iterator[list[Path]]:
    """Make the folders that a target lies in, for a block that puts it there; where it raises, they go again.

    Gives the folders in which there are new names then.
    """
    made: list[Path] = []
    try:
        with _failing_as(path):
            above = target.parent
            while not above.exists():
                made.append(above)
                above = above.parent
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(target)
        yield [target.parent, *(folder.parent for folder in made)]
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _put(new: Path, target: Path, path: Path, folders: Iterable[Path]) -> None:
    """Give what is new the name of its target in one step, and put the names in `folders` on the disk.

    What had that name is called `new` then, or is gone. Where the disk refuses the names, they are taken back.
    """
    there = os.path.lexists(target)
    exchanged = there and _exchange(new, target)
    if not exchanged and there and new.is_dir():
        _move_in_two_steps(new, target)
    elif not exchanged:
        new.replace(target)
    try:
        for folder in folders:
            _sync_folder(folder)
    except OSError as error:
        if exchanged and _exchange(new, target):
            raise
        if not there:
            target.rename(new)
            raise
        raise SystemFailureError(
            f"{path} was written, but it may not survive a loss of power: {error.strerror or error}"
        ) from None


def _be_like(new: Path, old: Path, mode: int) -> None:
    """Give what is new the mode and owner of what it replaces, as far as this user may; else what the umask leaves."""
    try:
        status = old.stat()
    except FileNotFoundError:
        new.chmod(mode & ~_umask())
        return
    if hasattr(os, "chown") and (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(OSError):
            os.chown(new, status.st_uid, status.st_gid)
    new.chmod(status.st_mode & (0o7777 if stat.S_ISDIR(status.st_mode) else 0o777))


def _heed_signals() -> None:
    """Raise KeyboardInterrupt where a signal to end the program came, and what it raised was lost."""
    if asked_to_end:
        raise KeyboardInterrupt


def _remove_file(path: Path) -> None:
    """Remove a file where it is still there, at the second attempt if need be; what stays is the next run's."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            return


def _remove_tree(folder: Path) -> None:
    """Remove a folder likewise, a signal to end the program put off until it is gone."""
    try:
        shutil.rmtree(folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _take_along(old: Path, new: Path, superseded: Collection[str]) -> None:
    """Let a new folder have the other files of the old one: by a second name, or as copies."""
    for entry in sorted(old.iterdir()):
        if entry.name in superseded or entry.name.endswith(TEMPORARY) or (new / entry.name).exists():
            continue
        try:
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
            else:
                _link_or_copy(entry, new / entry.name)
        except OSError as error:
            raise SystemFailureError(f"cannot keep {entry}: {error.strerror or error}") from None


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _move_in_two_steps(new: Path, target: Path) -> None:
    """Put a folder in the place of another where the system cannot exchange their names."""
    old = target.with_name(f".{_stem(target)}.{os.urandom(4).hex()}.old{TEMPORARY}")
    handle = None
    with contextlib.suppress(OSError):
        handle = os.open(target, os.O_RDONLY)
        _lock(handle)  # else another run might take it for one that was killed between the two names
    try:
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
        _remove_tree(old)
    finally:
        if handle is not None:
            os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, by `renameat2` on Linux and `renamex_np` on macOS. False where neither can."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, ctypes.c_uint(2))
        else:
            here = ctypes.c_int(-100)  # AT_FDCWD
            failed = library.renameat2(here, names[0], here, names[1], ctypes.c_uint(2))  # RENAME_EXCHANGE
    except (OSError, AttributeError, TypeError):
        return False
    return not failed


# --- temporary files -----------------------------------------------------------------------------------------------


def _new_file(target: Path, made: list[Path]) -> BinaryIO:
    """A new file beside `target`, locked for as long as it is open: so others tell that it is being written.

    Its name joins `made` before it is there, so that whoever is interrupted knows what to remove.
    """
    while True:
        made.append(_temporary_name(target))
        try:
            handle = os.open(made[-1], os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        except FileExistsError:
            made.pop()
            continue
        file: BinaryIO = open(handle, "w+b", buffering=0)  # noqa: PTH123, SIM115
        if _lock(handle) and os.fstat(handle).st_nlink:
            return file
        file.close()  # another process took it for abandoned before it was locked


def _new_folder(target: Path, made: list[Path]) -> int | None:
    """A new folder beside `target`; gives its locked handle, where a folder can be opened."""
    while True:
        made.append(_temporary_name(target))
        try:
            made[-1].mkdir(mode=0o700)
        except FileExistsError:
            made.pop()
            continue
        try:
            handle = os.open(made[-1], os.O_RDONLY)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        if _lock(handle) and made[-1].exists():
            return handle
        os.close(handle)


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{_stem(target)}.{os.urandom(4).hex()}{TEMPORARY}")


def _stem(target: Path) -> str:
    """As much of a name as leaves room for what tells a temporary one: systems count its bytes."""
    name = target.name[:100]
    while len(os.fsencode(name)) > 100:
        name = name[:-1]
    return name


def remove_abandoned(target: Path) -> None:
    """Remove what runs that were killed have left beside `target`: nobody holds its lock any more."""
    for path in target.parent.glob(f".{_globbed(_stem(target))}.*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            if path.is_symlink():
                continue
            if not path.is_dir():
                _remove_if_free(path)
            else:
                _remove_if_free(path, back_to=target if path.name.endswith(f".old{TEMPORARY}") else None)


def _globbed(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _remove_if_free(path: Path, back_to: Path | None = None) -> None:
    """Remove what nobody has locked; a folder whose run was killed between two names goes `back_to` its own."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not _lock(handle):
            return
        if back_to is not None and not back_to.exists():
            path.rename(back_to)
        elif stat.S_ISDIR(os.fstat(handle).st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock a file until it is closed. True as well where there are no locks: open files cannot be removed there."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
    return True


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
    for entry in folder.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            with contextlib.suppress(PermissionError):
                handle = os.open(entry, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Make new names durable. Not every system can open a folder, or sync one; those that cannot need no sync."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(handle)
