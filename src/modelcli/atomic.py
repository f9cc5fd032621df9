"""Replacing a file or a folder in one step: whatever happens on the way, the old one or the new one is there, whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from modelcli.errors import ModelcliError, RequestError, SystemFailureError

#: Signals to end the program that came. What a handler raises is lost where other code catches everything, as torch
#: does around an import: so it is asked again before something is replaced.
asked_to_end: list[int] = []

#: How the name ends of a file or folder that is still being written.
TEMPORARY = ".modelcli-tmp"


def check_target(path: Path, *, force: bool, folder: bool = False) -> None:
    """Raise where `path` cannot be written: it exists and `force` is not set, is of another kind, or is locked."""
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
    above = _existing_folder(path)
    if not above.is_dir():
        raise RequestError(f"cannot write {path}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SystemFailureError(f"cannot write {path}: no permission to write in the folder {above}")


def require_space(path: Path, nbytes: int) -> None:
    """Raise SystemFailureError where `nbytes` do not fit beside `path`; the old file is there until the new one is."""
    above = _existing_folder(path)
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
    check_target(path, force=force)
    target = Path(os.path.realpath(path)) if through_links else path
    with _failing_as(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target)
    made: list[Path] = []
    try:
        with _failing_as(path):
            with _new_file(target, made) as file:
                temporary = made[-1]
                yield file, temporary
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
            if not force and target.exists():
                raise RequestError(f"{path} exists by now", "--force replaces it")
            _heed_signals()
            temporary.replace(target)
            if durable:
                _sync_folder(target.parent)
    except BaseException:
        for temporary in made:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise


@contextlib.contextmanager
def replacing_folder(path: Path, *, force: bool, durable: bool = True) -> Iterator[Path]:
    """Give a new folder beside `path`; at the end of the block it takes the place of `path`, in one step.

    What else an old folder holds (a tokenizer, a configuration) goes along: the block says which files are its own by
    having written them, and `is_shard` tells of the others which were the old checkpoint's.
    """
    check_target(path, force=force, folder=True)
    target = Path(os.path.realpath(path))
    with _failing_as(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target)
    made: list[Path] = []
    lock = None
    try:
        with _failing_as(path):
            lock = _new_folder(target, made)
            temporary = made[-1]
            yield temporary
            if target.exists():
                if not force:
                    raise RequestError(f"{path} exists by now", "--force replaces it")
                temporary.chmod(target.stat().st_mode & 0o777)
                _take_along(target, temporary)
            else:
                temporary.chmod(0o777 & ~_umask())
            if durable:
                _sync_tree(temporary)
            _heed_signals()
            _swap(temporary, target)
            if durable:
                _sync_folder(target.parent)
    finally:
        # What stands there now is the old folder, or the new one where it did not come to the swap.
        for temporary in made:
            _remove_tree(temporary)
        if lock is not None:
            os.close(lock)


def _heed_signals() -> None:
    """Raise KeyboardInterrupt where a signal to end the program came, and what it raised was lost."""
    if asked_to_end:
        raise KeyboardInterrupt


def _remove_tree(folder: Path) -> None:
    """Remove a folder, a signal to end the program put off until it is gone."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def is_shard(name: str) -> bool:
    """Whether a file of a folder belongs to a checkpoint in shards: it goes when another one is written there."""
    return name.endswith((".safetensors", ".safetensors.index.json", TEMPORARY))


def _take_along(old: Path, new: Path) -> None:
    """Let a new folder have the files of the old one that are no shards: by a second name, or as copies."""
    for entry in sorted(old.iterdir()):
        if is_shard(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(entry, new / entry.name)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(new: Path, target: Path) -> None:
    """Put a folder in the place of another; where the system can, as one step that leaves the old one at `new`."""
    if not target.exists():
        new.rename(target)
        return
    if _exchange(new, target):
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old{TEMPORARY}")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _remove_tree(old)


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
    return target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}{TEMPORARY}")


def remove_abandoned(target: Path) -> None:
    """Remove what runs that were killed have left beside `target`: nobody holds its lock any more."""
    for path in target.parent.glob(f".{_globbed(target.name[:100])}.*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            if path.is_symlink():
                continue
            if not path.is_dir():
                _remove_if_free(path)
            elif path.name.endswith(f".old{TEMPORARY}") and not target.exists():
                path.rename(target)  # a run was killed between two names
            else:
                _remove_if_free(path)


def _globbed(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _remove_if_free(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not _lock(handle):
            return
        if stat.S_ISDIR(os.fstat(handle).st_mode):
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
    """Make new names durable. Not every system can open a folder; those that cannot need no sync."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
