"""Limits on what a constructor call may build (modules, time, bytes): 60 characters can mean 100 million blocks.

The limits apply to constructors of known libraries only. A user's own code has none.
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

#: The architecture of a record may build this many modules more than the record lists, because edits remove modules
#: and constructors drop some. The largest model of the built-in providers has 1,400 modules.
_BEYOND_LISTED = 2_000
#: Seconds of processor time. A record gets 20 times what the slowest model of the built-in providers takes.
_SECONDS_OF_RECORD = 5.0
_SECONDS_AS_TYPED = 30.0
#: The bytes of tensors that a constructor may create outside the meta device.
_BYTES_OF_RECORD = 256 * 1024 * 1024
#: Results smaller than this many bytes are not checked one by one: the process's memory is checked once in _OPERATIONS.
_SMALL = 1024 * 1024
_OPERATIONS = 1_000
#: How often the watching thread checks time and memory, in seconds.
_PERIOD = 0.02


@dataclass(frozen=True)
class Bounds:
    """The limits for building one architecture.

    Attributes:
        what: what an error calls the architecture.
        modules: the largest number of modules.
        seconds: the most processor time, in seconds.
        nbytes: the most bytes of tensors outside the meta device; None for no limit.
        of_file: whether the architecture comes from a file and not from the user. It decides the class of the error.
    """

    what: str
    modules: int
    seconds: float
    nbytes: int | None = None
    of_file: bool = False

    def refusal(self, found: str) -> ModelcliError:
        """Return the error for an architecture that exceeds a limit; `found` says by what it does."""
        kind = FileFormatError if self.of_file else RequestError
        return kind(
            f"{self.what} takes {found} to build",
            f"check the counts in its arguments; if it is right, set {limits.MODULES.variable} to more",
        )


def as_typed(what: str) -> Bounds:
    """Return the limits for a constructor call that the user has typed. `what` is the call."""
    return Bounds(what, limits.MODULES.value, _SECONDS_AS_TYPED * _patience())


def of_record(what: str, listed: int) -> Bounds:
    """Return the limits for the architecture of a record, in proportion to the number of modules that it lists."""
    modules = min(_BEYOND_LISTED + 2 * listed, limits.MODULES.value)
    if limits.MODULES.value > limits.MODULES.default:
        modules = limits.MODULES.value
    seconds = max(_SECONDS_OF_RECORD, modules / 1_000) * _patience()
    return Bounds(what, modules, seconds, _BYTES_OF_RECORD, of_file=True)


def of_configuration(what: str, listed: int | None = None, nbytes: int = 0) -> Bounds:
    """Return the limits for the architecture of a folder's configuration.

    Args:
        what: what an error calls the architecture.
        listed: the number of tensors in the folder's weights; None if it has none, so that any usual model is allowed.
        nbytes: the bytes of the folder's weights.
    """
    most = limits.MODULES.value
    if listed is not None and most <= limits.MODULES.default:
        most = min(_BEYOND_LISTED + 4 * listed, most)
    seconds = max(_SECONDS_OF_RECORD, most / 1_000) * _patience()
    return Bounds(what, most, seconds, _BYTES_OF_RECORD + 2 * nbytes, of_file=True)


def _patience() -> float:
    """Return the factor for time limits: a user who raises the limit on modules gets more time as well."""
    return max(1.0, limits.MODULES.value / limits.MODULES.default)


@contextlib.contextmanager
def enforced(bounds: Bounds | None) -> Iterator[None]:
    """End the construction in this context once it exceeds a limit; None sets no limits.

    Raises:
        FileFormatError: the architecture comes from a file and exceeds a limit.
        RequestError: the user's architecture exceeds a limit.
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
    plain = {
        name: getattr(nn.Module, name) for name in ("__init__", "__setstate__")
    }  # copying a module calls only `__setstate__`

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
    """The watching thread raises this in the constructor's thread. `except Exception` there does not catch it."""


@contextlib.contextmanager
def _watched(bounds: Bounds) -> Iterator[None]:
    """End a constructor that takes too much time or memory, such as an endless loop that creates no modules.

    The time is processor time, so that a busy machine causes no errors.
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
                    _raise_in(builder, None)  # if it has not been raised yet, it must not be raised later
    except _OutOfTimeError:
        raise bounds.refusal(why) from None


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Make another thread raise an exception before its next bytecode; None cancels one that it has not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )


class _TensorsBounded(TorchDispatchMode):
    """Raises an error before an operation whose result would exceed the limit; the meta device gives its size."""

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
    """Return the bytes of an operation's result, computed on the meta device; 0 if the meta device cannot run it."""

    def on_meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    try:
        if func._schema.is_mutable or func.is_view:
            return 0
        given = dict(kwargs)
        if any(argument.name == "device" for argument in func._schema.arguments):
            given["device"] = torch.device("meta")
        found = func(*pytree.tree_map(on_meta, args), **pytree.tree_map(on_meta, given))
    except Exception:  # the operation does not run on the meta device, so its size is not limited
        return 0
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor))


def _resident() -> int:
    """Return the resident memory of the process in bytes; 0 if the system does not provide it."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0
