"""Replacing a file in one step: whatever happens on the way, the old file or the new one is there, whole."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from modelcli.errors import ModelcliError, RequestError, SystemFailureError

#: How the name of a file ends that is still being written.
TEMPORARY = ".modelcli-tmp"


def check_target(path: Path, *, force: bool) -> None:
    """Raise where `path` cannot be written: it exists and `force` is not set, or is no plain file, or is locked."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:
        raise _failure(path, error) from None
    if mode is not None:
        if stat.S_ISDIR(mode):
            raise RequestError(f"{path} is a folder", "name a file in it")
        if not stat.S_ISREG(mode):
            raise RequestError(f"{path} is a device or a pipe, not a file")
        if not force:
            raise RequestError(f"{path} exists", "--force replaces it")
    folder = Path(os.path.realpath(path)).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise RequestError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SystemFailureError(f"cannot write {path}: no permission to write in the folder {folder}")


@contextlib.contextmanager
def replacing(path: Path, *, force: bool, durable: bool = True) -> Iterator[tuple[BinaryIO, Path]]:
    """Give a new file beside `path`; at the end of the block it takes the place of `path`.

    With `durable` it is on the disk by then, so that a loss of power cannot take it away.

    The parent folder is made. Where the block raises, the new file is removed and the old one is as it was. A link is
    followed: the file that it points to is replaced.
    """
    check_target(path, force=force)
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=TEMPORARY, dir=target.parent)
    except OSError as error:
        raise _failure(path, error) from None
    temporary = Path(name)
    try:
        with open(handle, "w+b") as file:  # noqa: PTH123
            yield file, temporary
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        if not force and target.exists():
            raise RequestError(f"{path} exists by now", "--force replaces it")
        temporary.replace(target)
        if durable:
            _sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, ModelcliError):
            raise _failure(path, error) from None
        raise


def _failure(path: Path, error: OSError) -> SystemFailureError:
    return SystemFailureError(f"cannot write {path}: {error.strerror or error}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the new name durable. Not every system can open a folder; those that cannot need no sync."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
