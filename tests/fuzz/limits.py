"""Limits on an input: its time, its memory, and no import, process or file that it causes."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import FrameType


class TookTooLongError(BaseException):
    """An input took too long. It is not an `Exception`, so that no parser catches it."""


@contextlib.contextmanager
def on_time(seconds: float) -> Iterator[None]:
    """Raise TookTooLongError in the block after this much processor time, if the system supports that."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPROF, _end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _end(_number: int, _frame: FrameType | None) -> None:
    raise TookTooLongError


@contextlib.contextmanager
def on_memory(nbytes: int) -> Iterator[None]:
    """Limit the address space of the process to this much more than it has, if the system supports that."""
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- what an input must not cause ----------------------------------------------------------------------------------

#: Events of `sys.audit` that no input may cause. `open` means opening to write; `import` means importing, in any way,
#: what the input names.
RUNNING = frozenset(
    {"import", "open", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"}
)
#: Events that a parser must not cause either. (torch itself evaluates its annotations.)
EVALUATING = RUNNING | {"exec"}
_LIBRARIES = frozenset({"torch", "torchvision", "modelcli"})


class _Watch(MetaPathFinder):
    """Records the forbidden events while an input runs, and none between inputs.

    Python also calls it as a finder for every module that is not imported yet; it finds none.
    """

    events: frozenset[str] = frozenset()
    data = b""
    seen: list[str]

    def find_spec(self, fullname: str, _path: object, _target: object = None, /) -> None:
        root = fullname.partition(".")[0]
        if root not in _LIBRARIES and root.encode() in self.data:
            self.seen.append(f"import {fullname}")

    def hook(self, event: str, args: tuple[object, ...]) -> None:
        if event not in self.events or event == "import":
            return
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            return
        self.seen.append(f"{event} {str(args[0])[:80]}")


_watch = _Watch()


@contextlib.contextmanager
def watched(data: bytes, events: frozenset[str]) -> Iterator[list[str]]:
    """Collect which of these events an input causes."""
    seen: list[str] = []
    if not events:
        yield seen
        return
    _install()
    _watch.events, _watch.data, _watch.seen = events, data, seen
    if "import" in events:
        sys.meta_path.insert(0, _watch)
    try:
        yield seen
    finally:
        _watch.events = frozenset()
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(_watch)


@functools.cache
def _install() -> None:
    """Install the audit hook once. It cannot be removed, so it first checks whether it is active."""
    sys.addaudithook(_watch.hook)
