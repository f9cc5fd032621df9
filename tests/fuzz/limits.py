"""What an input may cost: so much time, so much memory, and nothing that is imported, run or opened on its word."""

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
    """An input had no end. No `Exception`, so that no parser takes it for one of its own."""


@contextlib.contextmanager
def on_time(seconds: float) -> Iterator[None]:
    """End the block with TookTooLongError after so much time of the processor, where the system can do that."""
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
    """Let the process take so much more address space than it has, and no more, where the system can do that."""
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


# --- what happens on an input's word -------------------------------------------------------------------------------

#: What nothing may do because an input says so: events of `sys.audit`. `open` is to write; `import` is of what the
#: input names, and stands for every way to import.
RUNNING = frozenset(
    {"import", "open", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"}
)
#: What a parser may not do either; torch itself evaluates its annotations.
EVALUATING = RUNNING | {"exec"}
_LIBRARIES = frozenset({"torch", "torchvision", "modelcli"})


class _Watch(MetaPathFinder):
    """What is looked for while an input is run, and what was seen; no events between two inputs.

    As a finder it is asked for every module that is not there yet, and finds none.
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
    """Gather which of these events an input brings about."""
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
    """A hook stays for as long as the process does: there is one, and it looks at once whether it is wanted."""
    sys.addaudithook(_watch.hook)
