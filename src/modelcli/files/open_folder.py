"""A folder that is held open: what is done to the names in it is done there, whatever its path leads to meanwhile.

Who edits as root in a folder of another user may find a link where a file or a folder was a moment ago. So a path is
followed once, no link in it that was not there before, and everything else is done by open handles. Where the system
has no such calls (Windows), the paths themselves are used.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

#: What a file is opened with that somebody else may have put there: no link is followed, no pipe is waited for.
NO_SURPRISES = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_HAS_HANDLES = {os.open, os.rename, os.unlink, os.mkdir, os.rmdir, os.stat} <= os.supports_dir_fd
#: A folder that may be passed through and not listed can be opened so on Linux.
_PASSING = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)


class OpenFolder:
    """A folder by its handle. Names are single ones: `m.pth`."""

    def __init__(self, path: Path, handle: int | None = None) -> None:
        """Open a folder; links in `path` are those that `os.path.realpath` left, and none is followed."""
        self.path = path
        self._handle = _opened(path) if handle is None and _HAS_HANDLES else handle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def folder(self, name: str) -> OpenFolder:
        """A folder in this one."""
        handle = None if self._handle is None else os.open(name, _PASSING, dir_fd=self._handle)
        return OpenFolder(self.path / name, handle)

    def open(self, name: str, flags: int, mode: int = 0o777) -> int:
        """The handle of a file or folder in it. A link raises OSError; a pipe is opened, and not waited for."""
        return os.open(self._at(name), flags | NO_SURPRISES, mode, dir_fd=self._handle)

    def status(self, name: str) -> os.stat_result | None:
        """What the system knows of a name, links not followed; None where there is no such name."""
        try:
            return os.stat(self._at(name), dir_fd=self._handle, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def require_same(self, name: str, handle: int) -> None:
        """Raise OSError where a name is not that of an open file or folder any more."""
        found = self.status(name)
        if found is None or not os.path.samestat(found, os.fstat(handle)):
            raise OSError(errno.ESTALE, f"another program has put something else in the place of {name}")

    def names(self) -> list[str]:
        """The names in it; none where it cannot be listed."""
        if self._handle is None:
            return os.listdir(self.path)  # noqa: PTH208 -- names alone
        try:
            handle = os.open(".", os.O_RDONLY, dir_fd=self._handle)
        except OSError:
            return []
        try:
            return os.listdir(handle)  # noqa: PTH208 -- a Path has no handle
        finally:
            os.close(handle)

    def make(self, name: str, mode: int) -> None:
        """Make a folder in it."""
        os.mkdir(self._at(name), mode, dir_fd=self._handle)

    def remove(self, name: str) -> None:
        """Remove a file."""
        os.unlink(self._at(name), dir_fd=self._handle)

    def remove_empty(self, name: str) -> None:
        """Remove an empty folder."""
        os.rmdir(self._at(name), dir_fd=self._handle)

    def remove_tree(self, name: str, *, ignore_errors: bool = False) -> None:
        """Remove a folder with all that is in it."""
        if self.status(name) is not None:
            shutil.rmtree(self._at(name), ignore_errors=ignore_errors, dir_fd=self._handle)

    def replace(self, old: str, new: str) -> None:
        """Rename a file, over another one."""
        os.replace(self._at(old), self._at(new), src_dir_fd=self._handle, dst_dir_fd=self._handle)

    def rename(self, old: str, new: str) -> None:
        """Rename a file or folder."""
        os.rename(self._at(old), self._at(new), src_dir_fd=self._handle, dst_dir_fd=self._handle)

    def exchange(self, one: str, other: str) -> bool:
        """Exchange two names in one step, by `renameat2` on Linux, `renameatx_np` on macOS. False where neither can."""
        if self._handle is None:
            return False
        import ctypes

        here = ctypes.c_int(self._handle)
        names = os.fsencode(one), os.fsencode(other)
        try:
            library = ctypes.CDLL(None, use_errno=True)
            call = library.renameatx_np if sys.platform == "darwin" else library.renameat2
            failed = call(here, names[0], here, names[1], ctypes.c_uint(2))  # RENAME_SWAP, RENAME_EXCHANGE
        except (OSError, AttributeError, TypeError):
            return False
        return not failed

    def sync(self) -> None:
        """Make new names in it durable."""
        sync_folder(self.path if self._handle is None else ".", self._handle)

    def _at(self, name: str) -> str | Path:
        return self.path / name if self._handle is None else name


def _opened(path: Path) -> int:
    """The handle of a folder. On Linux no link on the way to it is followed."""
    if not hasattr(os, "O_PATH") or not path.is_absolute():
        return os.open(path, _PASSING)
    handle = os.open(path.anchor, _PASSING)
    for name in path.parts[1:]:
        above = handle
        try:
            handle = os.open(name, _PASSING, dir_fd=above)
        finally:
            os.close(above)
    return handle


def read_regular(path: Path, *, or_pipe: bool = False) -> bytes:
    """The bytes of a file. Raises OSError for a device or a socket, and for a pipe: nobody may ever write to it.

    With `or_pipe` a pipe is read that somebody writes to (`<(command)`); one that nobody has open is empty.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode) and not (or_pipe and stat.S_ISFIFO(mode)):
            raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))
        if stat.S_ISFIFO(mode):
            os.set_blocking(handle, True)
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def path_of_handle(handle: int | None, path: Path) -> Path:
    """A path to what is open that leads nowhere else, whatever becomes of its name; else `path`, its name."""
    if handle is not None:
        found = Path(f"/proc/self/fd/{handle}")
        try:
            if os.path.samestat(found.stat(), os.fstat(handle)):
                return found
        except OSError:  # no Linux, or no /proc
            pass
    return path


def sync_folder(folder: Path | str, above: int | None = None) -> None:
    """Make new names durable. Not every system can open a folder, or sync one; those that cannot need no sync."""
    try:
        handle = os.open(folder, os.O_RDONLY, dir_fd=above)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(handle)
