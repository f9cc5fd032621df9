"""The bytes of a storage with its elements converted to another floating-point dtype: a source that a writer takes.

Nothing is read or converted before the bytes are asked for. Then that happens in pieces of `PIECE` elements, on several
threads, so that at most `threads() + 1` results and `threads()` pieces that are read are in memory: 10 MiB with two
threads, 18 MiB with four, at the most (float64; half of it for float32).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from modelcli.checkpoints.storage import FileId, Storage, Windows, gathered, is_in_sequence
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.values.ordered_work import in_order

if TYPE_CHECKING:
    from modelcli.values.dtypes import Array

#: Elements converted at a time: 2 MiB of the widest dtype, which the processor's cache holds.
PIECE = 1 << 18


@dataclass(eq=False, slots=True)
class RangeWatch:
    """Says after a conversion whether it met something that `after` cannot hold: only then values are counted again."""

    exceeded: bool = False


@dataclass(frozen=True, slots=True)
class Conversion:
    """The elements of `source`, of dtype `before`, as `after`: these are the `nbytes` from `start` of the result.

    Bytes of the source behind its last whole element are left out. `watch` is no part of what is compared: equal
    conversions are one storage.
    """

    source: Storage
    before: str
    after: str
    start: int
    nbytes: int
    watch: RangeWatch = field(default_factory=RangeWatch, compare=False, repr=False)

    @property
    def in_sequence(self) -> bool:
        return is_in_sequence(self.source)

    def files(self) -> Iterable[FileId]:
        return self.source.files()

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, in pieces of at most 8 MiB. Raises FileFormatError where the source is not what it was."""
        step = PIECE * ITEM_BYTES[self.after]
        if self.in_sequence and self.nbytes > step:
            yield from self._in_sequence()
            return
        spans = [(start, min(step, self.nbytes - start)) for start in range(0, self.nbytes, step)]
        yield from map(self._piece, spans) if len(spans) < 2 else in_order(self._piece, spans)

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """The bytes in memory of their own."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> Conversion:
        """`nbytes` of the bytes, from `start`, which may lie inside an element."""
        return replace(self, start=self.start + start, nbytes=nbytes)

    def _piece(self, span: tuple[int, int]) -> memoryview:
        """So many bytes of these, from a start on."""
        from modelcli.values import reading

        start, nbytes = self.start + span[0], span[1]
        size, width = ITEM_BYTES[self.before], ITEM_BYTES[self.after]
        first, stop = start // width, -(-(start + nbytes) // width)
        made = self._converted(reading.memory_of(self.source.part(first * size, (stop - first) * size)))
        skipped = start - first * width
        return made[skipped : skipped + nbytes]

    def _in_sequence(self) -> Iterator[memoryview]:
        """The same bytes, from a source that is read from its first byte to its last once."""
        from modelcli.values import reading

        size, width = ITEM_BYTES[self.before], ITEM_BYTES[self.after]
        first, stop = self.start // width, -(-(self.start + self.nbytes) // width)
        skipped, left = self.start - first * width, self.nbytes
        whole = self.source.part(first * size, (stop - first) * size)
        for piece in reading.in_sequence(whole, PIECE * size):
            made = self._converted(piece)[skipped:][:left]
            skipped, left = 0, left - len(made)
            yield made

    def _converted(self, data: memoryview) -> memoryview:
        from modelcli.values import casting, reading
        from modelcli.values.dtypes import bits_of, numpy_dtype

        elements: Array = reading.array_of(data, numpy_dtype(self.before))
        if not self.watch.exceeded and casting.may_exceed(elements, self.before, self.after):
            self.watch.exceeded = True
        return bits_of(casting.cast(elements, self.before, self.after)).data.cast("B")


def converted(source: Storage, before: str, after: str) -> Conversion:
    """The elements of a storage as another dtype; both are floating-point dtypes that `casting.can_cast` takes."""
    elements = source.nbytes // ITEM_BYTES[before]
    return Conversion(source, before, after, 0, elements * ITEM_BYTES[after])
