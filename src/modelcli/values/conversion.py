"""A storage whose elements are converted to another floating-point dtype when a writer reads it.

The bytes are read and converted in pieces of `PIECE` elements on several threads. At most `threads() + 1` results and
`threads()` pieces of the source are in memory: at most 10 MiB with two threads and 18 MiB with four for float64, half
of that for float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from modelcli.checkpoints.storage import FileId, Storage, Windows, gathered, is_in_sequence
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.values.ordered_work import in_order
from modelcli.values.watch import Watch

if TYPE_CHECKING:
    from modelcli.values.dtypes import Array

#: The elements to convert at a time: 2 MiB of the widest dtype, which fit into the processor's cache.
PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class Conversion:
    """The elements of a storage, converted to another dtype.

    Bytes after the last complete element of the source are left out. Equal conversions count as one storage; `watch`
    does not matter for that.

    Attributes:
        source: the storage.
        before: its dtype.
        after: the dtype of the result.
        start: the first byte of the result that this object stands for.
        nbytes: the number of bytes.
        watch: records whether a value did not fit into `after`. Only then are such values counted.
    """

    source: Storage
    before: str
    after: str
    start: int
    nbytes: int
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)

    @property
    def in_sequence(self) -> bool:
        return is_in_sequence(self.source)

    def files(self) -> Iterable[FileId]:
        return self.source.files()

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces of at most 8 MiB. Raises FileFormatError if the source has changed."""
        step = PIECE * ITEM_BYTES[self.after]
        if self.in_sequence and self.nbytes > step:
            yield from self._in_sequence()
            return
        spans = [(start, min(step, self.nbytes - start)) for start in range(0, self.nbytes, step)]
        yield from map(self._piece, spans) if len(spans) < 2 else in_order(self._piece, spans)

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """Return the bytes in new memory."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> Conversion:
        """Return the `nbytes` bytes from `start`, which may be inside an element, as a storage."""
        return replace(self, start=self.start + start, nbytes=nbytes)

    def _piece(self, span: tuple[int, int]) -> memoryview:
        """Return the bytes of a span, given by its start and length."""
        from modelcli.values import reading

        start, nbytes = self.start + span[0], span[1]
        size, width = ITEM_BYTES[self.before], ITEM_BYTES[self.after]
        first, stop = start // width, -(-(start + nbytes) // width)
        made = self._converted(reading.memory_of(self.source.part(first * size, (stop - first) * size)))
        skipped = start - first * width
        return made[skipped : skipped + nbytes]

    def _in_sequence(self) -> Iterator[memoryview]:
        """Yield the same bytes from a source that can only be read from its start."""
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
        if not self.watch.seen and casting.may_exceed(elements, self.before, self.after):
            self.watch.seen = True
        return bits_of(casting.cast(elements, self.before, self.after)).data.cast("B")


def converted(source: Storage, before: str, after: str) -> Conversion:
    """Return the elements of a storage converted to another dtype; `casting.can_cast` must be true for both dtypes."""
    elements = source.nbytes // ITEM_BYTES[before]
    return Conversion(source, before, after, 0, elements * ITEM_BYTES[after])
