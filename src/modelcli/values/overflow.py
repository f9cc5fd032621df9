"""Values that a cast to a narrower dtype cannot hold: how many there are, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.storage import Storage
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.values.conversion import Conversion
from modelcli.wording import counted


@dataclass
class _Lost:
    """How many values of the tensors of one cast became Inf, NaN or the largest value of its dtype."""

    names: list[str]
    inf: int = 0
    nan: int = 0
    clamped: int = 0


def notes_of(tensors: Mapping[str, TensorEntry]) -> list[str]:
    """A line for each dtype that values did not fit into, after the bytes of these tensors have been converted.

    Only tensors whose conversion met something beyond the range are read again. What has several names is counted
    once, under the first.
    """
    exceeded = {
        conversion
        for storage in {id(entry.storage): entry.storage for entry in tensors.values()}.values()
        for conversion, _ in _conversions(storage)
        if conversion.watch.exceeded
    }
    if not exceeded:
        return []
    found: dict[str, _Lost] = {}
    seen: set[object] = set()
    for name, entry in tensors.items():
        for conversion, first in _conversions(entry.storage):
            view = (conversion, entry.offset, entry.shape, entry.stride)
            if conversion in exceeded and view not in seen:
                seen.add(view)
                before = replace(entry, dtype=conversion.before, storage=conversion.source, offset=entry.offset + first)
                _count(name, before, conversion, found.setdefault(conversion.after, _Lost([])))
    return [_told(dtype, lost) for dtype, lost in found.items() if lost.names]


def _conversions(storage: Storage) -> Iterator[tuple[Conversion, int]]:
    """The casts that the bytes of a storage go through, the last first; where in the source of each they begin."""
    first = 0
    while isinstance(storage, Conversion):
        first += storage.start // ITEM_BYTES[storage.after]
        yield storage, first
        storage = storage.source


def _count(name: str, before: TensorEntry, conversion: Conversion, lost: _Lost) -> None:
    """Count what a tensor loses in a cast; `before` shows what is converted."""
    from modelcli.values import casting, reading

    counts = [0, 0, 0]
    with reading.Readers([before]) as readers:
        for (piece,) in reading.pieces_of(reading.at_hand(before)):
            here = casting.lost_in(readers.own().elements(piece), conversion.before, conversion.after)
            counts = [a + b for a, b in zip(counts, here, strict=True)]
    lost.inf, lost.nan, lost.clamped = lost.inf + counts[0], lost.nan + counts[1], lost.clamped + counts[2]
    if any(counts):
        lost.names.append(name)


def _told(dtype: str, lost: _Lost) -> str:
    from modelcli.values.dtypes import LARGEST

    most = LARGEST[dtype]
    what = [
        f"{counted(number, 'value')} became {became}"
        for number, became in ((lost.inf, "Inf"), (lost.nan, "NaN"), (lost.clamped, f"{most:,.0f}"))
        if number
    ]
    more = f" and {counted(len(lost.names) - 1, 'more tensor')}" if len(lost.names) > 1 else ""
    return f"{' and '.join(what)} in {lost.names[0]}{more}: {dtype} ends at {most:,.6g}"
