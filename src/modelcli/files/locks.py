"""Locks that several processes heed. They end with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

#: A lock that is a file of its own, on systems without `fcntl`, is taken over when it is so many seconds old.
STALE = 600.0

_STEP = 0.05


def try_to_lock(handle: int) -> bool:
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


@contextlib.contextmanager
def held(path: Path, patience: float, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file that is replaced rather than written into; without such a file nothing is locked.

    `waiting` is called once, where another process holds it. Raises TimeoutError after `patience` seconds.
    """
    try:
        import fcntl  # noqa: F401 -- tells that there are locks of open files
    except ImportError:
        taken = _file_of_its_own
    else:
        taken = _of_the_file
    deadline, told = time.monotonic() + patience, False
    while (release := taken(path)) is None:
        if not told:
            waiting()
            told = True
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has held the lock of {path} for {patience:.0f} s")
        time.sleep(_STEP)
    try:
        yield
    finally:
        release()


def _of_the_file(path: Path) -> Callable[[], None] | None:
    """Lock the file itself; gives how to release it, or None where another process holds it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError):
        return lambda: None  # there is none, or none that can be read: who reads it says so
    try:
        # Who held it may have put another file in its place: then that one's lock counts.
        if try_to_lock(handle) and os.path.samestat(os.fstat(handle), path.stat()):
            return lambda: os.close(handle)
    except OSError:
        pass
    os.close(handle)
    return None


def _file_of_its_own(path: Path) -> Callable[[], None] | None:
    """The same by a file beside it, which Windows removes with the process that holds it."""
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
        # Windows says so of a lock that is just being removed.
        return None if error.errno == errno.EACCES and lock.exists() else lambda: None

    def release() -> None:
        os.close(handle)
        with contextlib.suppress(OSError):
            lock.unlink()

    return release
