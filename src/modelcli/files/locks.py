"""File locks between processes. A lock ends with the process that holds it, even if that crashes."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

#: On systems without `fcntl` the lock is a separate file. Another process takes it over after so many seconds.
STALE = 600.0

_STEP = 0.05


def try_to_lock(handle: int) -> bool:
    """Lock an open file until it is closed. Returns False if another process holds the lock.

    Returns True on systems without locks, where open files cannot be removed.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
    return True


@contextlib.contextmanager
def held(path: Path, patience: float, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file that programs replace as a whole. If the file does not exist, nothing is locked.

    Args:
        path: the file.
        patience: seconds to wait for another process.
        waiting: called once if another process holds the lock.

    Raises:
        TimeoutError: another process held the lock for `patience` seconds.
    """
    try:
        import fcntl  # noqa: F401 -- shows that the system can lock open files
    except ImportError:
        try_to_take = _try_lock_file
    else:
        try_to_take = _try_lock
    deadline, has_reported = time.monotonic() + patience, False
    while (release := try_to_take(path)) is None:
        if not has_reported:
            waiting()
            has_reported = True
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has held the lock of {path} for {patience:.0f} s")
        time.sleep(_STEP)
    try:
        yield
    finally:
        release()


def _try_lock(path: Path) -> Callable[[], None] | None:
    """Lock the file itself. Returns a function that releases the lock, or None if another process holds it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError):
        return lambda: None  # no such file, or not readable: reading it reports the error
    try:
        # The previous holder may have replaced the file; then the lock of the new file counts.
        if try_to_lock(handle) and os.path.samestat(os.fstat(handle), path.stat()):
            return lambda: os.close(handle)
    except OSError:
        pass
    os.close(handle)
    return None


def _try_lock_file(path: Path) -> Callable[[], None] | None:
    """The same with a lock file beside it, which Windows removes when the process that holds it ends."""
    lock = path.with_name(f".{path.name}.lock")
    if not path.exists():
        return lambda: None
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_TEMPORARY", 0))
    except FileExistsError:
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > STALE:
                lock.unlink()
        return None
    except OSError as error:
        # Windows gives this error for a lock file that is being removed.
        return None if error.errno == errno.EACCES and lock.exists() else lambda: None

    def release() -> None:
        os.close(handle)
        with contextlib.suppress(OSError):
            lock.unlink()

    return release
