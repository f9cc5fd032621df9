"""Report how many values a cast to a narrower dtype could not hold, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.storage import Storage
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.values.conversion import Conversion
from modelcli.values.watch import Watch
from modelcli.wording import counted


@dataclass
class _Lost:
    """The number of values in the tensors of one cast that became Inf, NaN or the largest value of its dtype."""

    names: list[str]
    inf: int = 0
    nan: int = 0
    clamped: int = 0


def notes_of(tensors: Sequence[tuple[str, TensorEntry]]) -> list[str]:
    """Return a note for each dtype that some values did not fit into. Call it after the tensors have been converted.

    Only tensors whose conversion met such a value are read again. A tensor with several names counts once, under its
    first name. A name may have several tensors, of which it is made.
    """
    exceeded = {
        conversion
        for storage in {id(entry.storage): entry.storage for _, entry in tensors}.values()
        for conversion, _ in _conversions(storage)
        if conversion.watch.seen
    }
    if not exceeded:
        return []
    found: dict[str, _Lost] = {}
    seen: set[object] = set()
    for name, entry in tensors:
        for conversion, first in _conversions(entry.storage):
            view = (conversion, entry.offset, entry.shape, entry.stride)
            if conversion in exceeded and view not in seen:
                seen.add(view)
                before = replace(entry, dtype=conversion.before, storage=conversion.source, offset=entry.offset + first)
                _count(name, before, conversion, found.setdefault(conversion.after, _Lost([])))
    return [_note(dtype, lost) for dtype, lost in found.items() if lost.names]


def watches_of(tensors: Sequence[tuple[str, TensorEntry]]) -> list[Watch]:
    """Return what recorded, for each cast of the tensors in order, whether a value did not fit. Others may be set."""
    return [conversion.watch for _, entry in tensors for conversion, _ in _conversions(entry.storage)]


def _conversions(storage: Storage) -> Iterator[tuple[Conversion, int]]:
    """Yield the casts of a storage, the last one first, each with the element of its source at which it begins."""
    first = 0
    while isinstance(storage, Conversion):
        first += storage.start // ITEM_BYTES[storage.after]
        yield storage, first
        storage = storage.source


def _count(name: str, before: TensorEntry, conversion: Conversion, lost: _Lost) -> None:
    """Count the values that a tensor loses in a cast. `before` is the tensor before the cast."""
    from modelcli.values import casting, reading

    counts = [0, 0, 0]
    with reading.Readers([before]) as readers:
        for (piece,) in reading.pieces_of(reading.at_hand(before)):
            here = casting.lost_in(readers.own().elements(piece), conversion.before, conversion.after)
            counts = [a + b for a, b in zip(counts, here, strict=True)]
    lost.inf, lost.nan, lost.clamped = lost.inf + counts[0], lost.nan + counts[1], lost.clamped + counts[2]
    if any(counts):
        lost.names.append(name)


def _note(dtype: str, lost: _Lost) -> str:
    from modelcli.values.dtypes import LARGEST

    most = LARGEST[dtype]
    what = [
        f"{counted(number, 'value')} became {became}"
        for number, became in ((lost.inf, "Inf"), (lost.nan, "NaN"), (lost.clamped, f"{most:,.0f}"))
        if number
    ]
    more = f" and {counted(len(lost.names) - 1, 'more tensor')}" if len(lost.names) > 1 else ""
    return f"{' and '.join(what)} in {lost.names[0]}{more}: the largest value of {dtype} is {most:,.6g}"
