"""How much may be made of a constructor call: modules, seconds, bytes. 60 characters can ask for 100 million blocks.

Only constructors of known libraries are held to this. Code of the user's may take what it needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from modelcli.checkpoints import limits
from modelcli.errors import FileFormatError, ModelcliError, RequestError

#: Modules that a record may make beyond those that it lists: what its edits took out again, what a constructor makes
#: and drops. The largest model of the built-in providers has 1,400.
_BEYOND_LISTED = 2_000
#: Seconds of processor time: 20 times what the slowest model of the built-in providers takes for its modules.
_SECONDS_OF_RECORD = 5.0
_SECONDS_AS_TYPED = 30.0
#: Memory for tensors that a constructor makes on its way and not on the meta device.
_BYTES_OF_RECORD = 256 * 1024 * 1024
#: What is smaller is not looked at by itself, but once in so many operations all of it together.
_SMALL = 1024 * 1024
_OPERATIONS = 1_000
#: How often the watch looks at the clock, in seconds.
_PERIOD = 0.02


@dataclass(frozen=True)
class Bounds:
    """What building one architecture may take. `what` names it in a refusal.

    `nbytes` bounds the tensors that are not on the meta device; None leaves that to the machine's memory. `of_file`
    says that a file asks for it, and not the user.
    """

    what: str
    modules: int
    seconds: float
    nbytes: int | None = None
    of_file: bool = False

    def refusal(self, found: str) -> ModelcliError:
        kind = FileFormatError if self.of_file else RequestError
        return kind(
            f"{self.what} takes {found} to build",
            f"check the counts in its arguments; if it is right, set {limits.MODULES.variable} to more",
        )


def as_typed(what: str) -> Bounds:
    """The bounds of a constructor call that the user has written."""
    return Bounds(what, limits.MODULES.value, _SECONDS_AS_TYPED * _patience())


def of_record(what: str, listed: int) -> Bounds:
    """The bounds of what a record asks for that lists so many modules: in proportion to what it says itself."""
    modules = min(_BEYOND_LISTED + 2 * listed, limits.MODULES.value)
    if limits.MODULES.value > limits.MODULES.default:
        modules = limits.MODULES.value
    seconds = max(_SECONDS_OF_RECORD, modules / 1_000) * _patience()
    return Bounds(what, modules, seconds, _BYTES_OF_RECORD, of_file=True)


def of_configuration(what: str, listed: int | None = None, nbytes: int = 0) -> Bounds:
    """The bounds of what the configuration in a folder asks for.

    Args:
        what: what a refusal calls it.
        listed: the number of tensors of its weights; None where there are none, and it may ask for any usual model.
        nbytes: the bytes of its weights.
    """
    most = limits.MODULES.value
    if listed is not None and most <= limits.MODULES.default:
        most = min(_BEYOND_LISTED + 4 * listed, most)
    seconds = max(_SECONDS_OF_RECORD, most / 1_000) * _patience()
    return Bounds(what, most, seconds, _BYTES_OF_RECORD + 2 * nbytes, of_file=True)


def _patience() -> float:
    """More time for who allows more modules."""
    return max(1.0, limits.MODULES.value / limits.MODULES.default)


@contextlib.contextmanager
def held(bounds: Bounds | None) -> Iterator[None]:
    """Refuse what is built in the block once it takes more than the bounds; None bounds nothing.

    Raises FileFormatError where a file asks for it, RequestError where the user does.
    """
    if bounds is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_counted_modules(bounds))
        if bounds.nbytes is not None:
            stack.enter_context(_TensorsBounded(bounds, bounds.nbytes))
        stack.enter_context(_watched(bounds))
        yield


@contextlib.contextmanager
def _counted_modules(bounds: Bounds) -> Iterator[None]:
    made = 0
    plain = {name: getattr(nn.Module, name) for name in ("__init__", "__setstate__")}  # a copy has no other start

    def counting(start: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(start)
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            nonlocal made
            made += 1
            if made > bounds.modules:
                raise bounds.refusal(f"more than {bounds.modules:,} modules")
            start(self, *args, **kwargs)

        return call

    for name, start in plain.items():
        setattr(nn.Module, name, counting(start))
    try:
        yield
    finally:
        for name, start in plain.items():
            setattr(nn.Module, name, start)


class _OutOfTimeError(BaseException):
    """Raised in the building thread by the watch: no `except Exception` of a constructor holds it up."""


@contextlib.contextmanager
def _watched(bounds: Bounds) -> Iterator[None]:
    """End a loop that makes no modules and does not come to its end.

    Processor time counts, so that a busy machine refuses nothing.
    """
    builder, ended, lock = threading.get_ident(), threading.Event(), threading.Lock()
    last = time.process_time() + bounds.seconds
    before, fired, why = _resident(), False, ""

    def watch() -> None:
        nonlocal fired, why
        while not ended.wait(_PERIOD):
            if time.process_time() > last:
                why = f"more than {bounds.seconds:.0f} s"
            elif bounds.nbytes is not None and _resident() - before > 2 * bounds.nbytes:
                why = f"more than {bounds.nbytes / 1e6:,.0f} MB"
            if why:
                with lock:
                    if not ended.is_set():
                        fired = True
                        _raise_in(builder, _OutOfTimeError)
                return

    threading.Thread(target=watch, name="modelcli-watch", daemon=True).start()
    try:
        try:
            yield
        finally:
            with lock:
                ended.set()
                if fired:
                    _raise_in(builder, None)  # where it has not struck yet, it shall not strike later
    except _OutOfTimeError:
        raise bounds.refusal(why) from None


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Let another thread raise an exception before its next step; None takes back one that it has not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )


class _TensorsBounded(TorchDispatchMode):
    """Refuses an operation whose result would not fit, before it is carried out: the meta device tells the size."""

    def __init__(self, bounds: Bounds, nbytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bounds = bounds
        self.nbytes = nbytes
        self.before = _resident()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        flat = pytree.arg_tree_leaves(*args, **kwargs)
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        devices = [value for value in flat if isinstance(value, torch.device)]
        on_meta = (
            all(t.is_meta for t in tensors)
            if tensors and not devices
            else bool(devices) and all(device.type == "meta" for device in devices)
        )
        if not on_meta:
            needed = _result_bytes(func, args, kwargs)
            if needed > _SMALL or self.operations % _OPERATIONS == 0:
                taken = max(_resident() - self.before, 0) + needed
                if taken > self.nbytes:
                    raise self.bounds.refusal(f"{taken / 1e6:,.0f} MB beside its parameters")
        return func(*args, **kwargs)


def _result_bytes(func: Any, args: Any, kwargs: Any) -> int:
    """The bytes of what an operation gives, as the meta device says; 0 where that cannot say."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    try:
        if func._schema.is_mutable or func.is_view:
            return 0
        given = dict(kwargs)
        if any(argument.name == "device" for argument in func._schema.arguments):
            given["device"] = torch.device("meta")
        found = func(*pytree.tree_map(moved, args), **pytree.tree_map(moved, given))
    except Exception:  # what has no meaning there is carried out as it is
        return 0
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor))


def _resident() -> int:
    """The bytes of memory that the process holds; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0
