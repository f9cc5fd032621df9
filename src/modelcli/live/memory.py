"""How much memory there is, asked before it is taken."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.live.sources import is_composite, is_lazy, named_tensors


def bytes_of(module: nn.Module) -> int:
    """The bytes that a module's parameters and buffers take, each storage once."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in named_tensors(module).values()
        if not is_lazy(tensor) and not is_composite(tensor)
    }
    return sum(storages.values())


def available() -> int | None:
    """The bytes that can be allocated without swapping, or None where the system does not tell."""
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
    """Whether `nbytes` are to be had; yes where the system does not tell."""
    there = available()
    return there is None or nbytes <= there


#: The most that `require` lets pass, and for whose sake: the last one holds.
_ceilings: list[tuple[int, str]] = []


@contextlib.contextmanager
def at_most(nbytes: int, whose: str) -> Iterator[None]:
    """Let no more be required in the block, however much there is. `whose` names the file that asks for it."""
    _ceilings.append((nbytes, whose))
    try:
        yield
    finally:
        _ceilings.pop()


def require(nbytes: int, what: str) -> None:
    """Raise SystemFailureError where `nbytes` are more than there is.

    Within `at_most`, raises FileFormatError where they are more than that.
    """
    if _ceilings and nbytes > _ceilings[-1][0]:
        most, whose = _ceilings[-1]
        raise FileFormatError(
            f"{what} takes {nbytes / 1e6:,.0f} MB, far more than {whose} holds; the limit is {most / 1e6:,.0f} MB",
            "--arch names an architecture that may take more",
        )
    there = available()
    if there is not None and nbytes > there:
        raise SystemFailureError(
            f"{what} takes {nbytes / 1e6:,.0f} MB, and {there / 1e6:,.0f} MB of memory are free",
            "check the sizes in its arguments",
        )
