"""An open folder, in which files are created and renamed through its handle, whatever happens to its path meanwhile.

If root edits a file in a folder of another user, that user may replace a file or folder by a link at any time. So
modelcli resolves a path once, follows no link that appears later, and does everything else through open handles. On
systems without such calls (Windows) it uses the paths.
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

#: The flags for opening a file that another user may have put there: do not follow a link, do not wait for a pipe.
NO_SURPRISES = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_HAS_HANDLES = {os.open, os.rename, os.unlink, os.mkdir, os.rmdir, os.stat} <= os.supports_dir_fd
#: The flags for opening a folder. On Linux they suffice for a folder that the user may traverse but not list.
_PASSING = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)


class OpenFolder:
    """A folder with an open handle. All names are single names in it, such as `m.pth`."""

    def __init__(self, path: Path, handle: int | None = None) -> None:
        """Open a folder. `path` comes from `os.path.realpath`; a link in it is not followed."""
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
        """Open a folder in this one."""
        handle = None if self._handle is None else os.open(name, _PASSING, dir_fd=self._handle)
        return OpenFolder(self.path / name, handle)

    def open(self, name: str, flags: int, mode: int = 0o777) -> int:
        """Open a file or folder in it. A link raises OSError; a pipe is opened without waiting. Returns the handle."""
        return os.open(self._at(name), flags | NO_SURPRISES, mode, dir_fd=self._handle)

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of a name, without following links; None if there is no such name."""
        try:
            return os.stat(self._at(name), dir_fd=self._handle, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def require_same(self, name: str, handle: int) -> None:
        """Raise OSError if the name no longer belongs to the open file or folder."""
        found = self.status(name)
        if found is None or not os.path.samestat(found, os.fstat(handle)):
            raise OSError(errno.ESTALE, f"another program has put something else in the place of {name}")

    def names(self) -> list[str]:
        """Return the names in it; an empty list if the user may not list it."""
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
        """Remove a folder with everything in it."""
        if self.status(name) is not None:
            shutil.rmtree(self._at(name), ignore_errors=ignore_errors, dir_fd=self._handle)

    def replace(self, old: str, new: str) -> None:
        """Rename a file; an existing file `new` is replaced."""
        os.replace(self._at(old), self._at(new), src_dir_fd=self._handle, dst_dir_fd=self._handle)

    def rename(self, old: str, new: str) -> None:
        """Rename a file or folder."""
        os.rename(self._at(old), self._at(new), src_dir_fd=self._handle, dst_dir_fd=self._handle)

    def exchange(self, one: str, other: str) -> bool:
        """Exchange two names in one step (`renameat2` on Linux, `renameatx_np` on macOS). False if neither works."""
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
        """Flush new names in it to the disk."""
        sync_folder(self.path if self._handle is None else ".", self._handle)

    def _at(self, name: str) -> str | Path:
        return self.path / name if self._handle is None else name


def _opened(path: Path) -> int:
    """Open a folder and return the handle. On Linux no link in the path is followed."""
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
    """Return the bytes of a regular file. Raises OSError for a device, a socket or a pipe, which might never end.

    With `or_pipe` a pipe is read too (`<(command)`); one that no process has open for writing is empty.
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
    """Return a path through the open handle, which stays valid if the name changes; `path` if the system has none."""
    if handle is not None:
        found = Path(f"/proc/self/fd/{handle}")
        try:
            if os.path.samestat(found.stat(), os.fstat(handle)):
                return found
        except OSError:  # no Linux, or no /proc
            pass
    return path


def sync_folder(folder: Path | str, above: int | None = None) -> None:
    """Flush new names in a folder to the disk. Does nothing on systems that cannot open or sync a folder."""
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
