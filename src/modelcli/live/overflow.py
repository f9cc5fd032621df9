"""Elements that a cast to a narrower dtype cannot hold: how many there are, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from modelcli.live.describe import dtype_name
from modelcli.live.sources import Computed, Conversion, is_composite, is_lazy, named_tensors, real_tensor, source_of
from modelcli.live.stats import pieces_of
from modelcli.wording import counted


@dataclass
class _Lost:
    """How many finite elements of the tensors of one cast became Inf, NaN or the largest number of its dtype."""

    names: list[str]
    inf: int = 0
    nan: int = 0
    clamped: int = 0


def notes_of(module: nn.Module) -> list[str]:
    """A line for each dtype that elements of a live model did not fit into, after its bytes have been written.

    Only tensors of which something beyond the range was seen while it was converted are looked at again.
    """
    found: dict[torch.dtype, _Lost] = {}
    seen: set[object] = set()
    for name, tensor in named_tensors(module).items():
        if is_lazy(tensor) or is_composite(tensor):
            continue
        for conversion in _conversions(tensor):
            view = (id(conversion), tensor.storage_offset(), tensor.size(), tensor.stride())
            if view not in seen:
                seen.add(view)
                _count(name, tensor, conversion, found.setdefault(conversion.dtype, _Lost([])))
    return [_told(dtype, lost) for dtype, lost in found.items() if lost.names]


def _conversions(tensor: torch.Tensor) -> Iterator[Conversion]:
    """The casts that a tensor went through in which something may have been lost, the last first."""
    source = source_of(tensor)
    while isinstance(source, Computed) and (conversion := source.conversion) is not None:
        if conversion.may_exceed:
            yield conversion
        source = source_of(conversion.flat)


def _count(name: str, tensor: torch.Tensor, conversion: Conversion, lost: _Lost) -> None:
    """Count what a tensor lost in a cast: it shows the same elements of what was converted."""
    before = conversion.flat.as_strided(tensor.size(), tensor.stride(), int(tensor.storage_offset()))
    most, saturates = torch.finfo(conversion.dtype).max, _saturates(conversion)
    counts = [0, 0, 0]
    for piece in pieces_of(before):
        numbers = real_tensor(piece)
        after = numbers.to(conversion.dtype).to(torch.float64)
        wide = numbers.to(torch.float64)
        counts[0] += int((wide.isfinite() & after.isinf()).sum())
        counts[1] += int((~wide.isnan() & after.isnan()).sum())
        if saturates:
            counts[2] += int(((wide.abs() > most) & after.isfinite()).sum())
    lost.inf, lost.nan, lost.clamped = (a + b for a, b in zip((lost.inf, lost.nan, lost.clamped), counts, strict=True))
    if any(counts):
        lost.names.append(name)


def _saturates(conversion: Conversion) -> bool:
    """Whether torch brings what is beyond the range of a dtype to the end of it, as it does for some of fp8."""
    beyond = torch.tensor(torch.finfo(conversion.flat.dtype).max, dtype=conversion.flat.dtype)
    return bool(beyond.to(conversion.dtype).to(torch.float64).isfinite())


def _told(dtype: torch.dtype, lost: _Lost) -> str:
    what = [
        f"{counted(number, 'value')} became {became}"
        for number, became in ((lost.inf, "Inf"), (lost.nan, "NaN"), (lost.clamped, f"{torch.finfo(dtype).max:,.0f}"))
        if number
    ]
    more = f" and {counted(len(lost.names) - 1, 'more tensor')}" if len(lost.names) > 1 else ""
    return f"{' and '.join(what)} in {lost.names[0]}{more}: {dtype_name(dtype)} ends at {torch.finfo(dtype).max:,.6g}"
