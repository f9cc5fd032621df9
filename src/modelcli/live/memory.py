"""Check how much memory is free before it is needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.live.sources import is_composite, is_lazy, named_tensors


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers, each storage counted once."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in named_tensors(module).values()
        if not is_lazy(tensor) and not is_composite(tensor)
    }
    return sum(storages.values())


def available() -> int | None:
    """Return the bytes that can be allocated without swapping; None if the system does not report them."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def fits(nbytes: int) -> bool:
    """Whether `nbytes` are free; True if the system does not report it."""
    free = available()
    return free is None or nbytes <= free


#: The limits of `require` in bytes, with the file that each is for. The last one is in force.
_ceilings: list[tuple[int, str]] = []


@contextlib.contextmanager
def at_most(nbytes: int, whose: str) -> Iterator[None]:
    """Limit what `require` allows in the block, however much memory is free. `whose` names the file."""
    _ceilings.append((nbytes, whose))
    try:
        yield
    finally:
        _ceilings.pop()


def require(nbytes: int, what: str) -> None:
    """Raise an error if the system or the file's limit does not allow `nbytes` of memory.

    Args:
        nbytes: the bytes needed.
        what: what needs them, for the message.

    Raises:
        FileFormatError: the limit of `at_most` is exceeded.
        SystemFailureError: so much memory is not free.
    """
    if _ceilings and nbytes > _ceilings[-1][0]:
        most, whose = _ceilings[-1]
        raise FileFormatError(
            f"{what} needs {nbytes / 1e6:,.0f} MB, far more than {whose} contains; the limit is {most / 1e6:,.0f} MB",
            "pass --arch REFERENCE, which has no such limit",
        )
    free = available()
    if free is not None and nbytes > free:
        raise SystemFailureError(
            f"{what} needs {nbytes / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB of memory are free",
            "check the sizes in its arguments",
        )
