"""A storage with the elements of a weight, each times the scale of its block, as float32 in row-major order.

The formula is that of `Fp8Dequantize` of transformers (`integrations/finegrained_fp8.py`) and of `weight_dequant` in
DeepSeek-V3's `inference/kernel.py`: the elements and the scales become float32 and are multiplied, and the caller
rounds the product once to the dtype that is wanted. transformers does the same for fp8 weights of compressed-tensors
(`CompressedTensorsDequantize`). compressed-tensors itself multiplies in the dtype of the scales, which gives the same
bits unless the wanted dtype has more precision than the scales.

The bytes are read and multiplied in pieces of `PIECE` elements on several threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from modelcli.checkpoints.storage import FileId, Storage, Windows, gathered, is_in_sequence
from modelcli.model.tensors import Shape
from modelcli.values import casting, reading
from modelcli.values.dtypes import Array, bits_of, numpy_dtype
from modelcli.values.ordered_work import in_order
from modelcli.values.watch import Watch

#: The elements to multiply at a time.
PIECE = 1 << 18
_WIDTH = 4


@dataclass(frozen=True, slots=True)
class Products:
    """The elements of a weight times their scales: `nbytes` bytes from `start`.

    Two of them are equal only if they are the same part of what one call of `products` made.

    Attributes:
        weight: its elements in row-major order.
        dtype: their dtype, which has one byte.
        shape: its shape.
        scale: the scales in row-major order, as float32.
        grid: the number of blocks in the last two axes; None if there is one scale.
        block: the rows and columns of a block; None if there is one scale.
        start: the first byte that this object stands for.
        nbytes: the number of bytes.
        watch: records whether a scale was not finite.
    """

    weight: Storage = field(compare=False)
    dtype: str = field(compare=False)
    shape: Shape = field(compare=False)
    scale: Storage = field(compare=False)
    grid: tuple[int, int] | None = field(compare=False)
    block: tuple[int, int] | None = field(compare=False)
    start: int
    nbytes: int
    watch: Watch = field(default_factory=Watch, repr=False)

    @property
    def in_sequence(self) -> bool:
        return is_in_sequence(self.weight)

    def files(self) -> Iterable[FileId]:
        return {*self.weight.files(), *self.scale.files()}

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces of at most 1 MiB. Raises FileFormatError if a file has changed."""
        first, stop = self.start // _WIDTH, -(-(self.start + self.nbytes) // _WIDTH)
        spans = [(at, min(at + PIECE, stop)) for at in range(first, stop, PIECE)]
        if self.in_sequence and len(spans) > 1:
            pieces = reading.in_sequence(self.weight.part(first, stop - first), PIECE)
            made: Iterable[memoryview] = (
                self._multiplied(at, piece) for (at, _), piece in zip(spans, pieces, strict=True)
            )
        else:
            made = map(self._piece, spans) if len(spans) < 2 else in_order(self._piece, spans)
        skipped, left = self.start - first * _WIDTH, self.nbytes
        for piece in made:
            wanted = piece[skipped : skipped + left]
            skipped, left = 0, left - len(wanted)
            yield wanted

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """Return the bytes in new memory."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> Products:
        """Return the `nbytes` bytes from `start`, which may be inside an element, as a storage."""
        return replace(self, start=self.start + start, nbytes=nbytes)

    def _piece(self, span: tuple[int, int]) -> memoryview:
        """Return the bytes of the products from one element to before another."""
        at, stop = span
        return self._multiplied(at, reading.memory_of(self.weight.part(at, stop - at)))

    def _multiplied(self, at: int, data: memoryview) -> memoryview:
        """Return the bytes of the products of elements, the first of which is number `at`."""
        elements = casting.cast(reading.array_of(data, numpy_dtype(self.dtype)), self.dtype, "float32")
        with np.errstate(all="ignore"):
            elements *= self._factors(at, at + len(elements))
        return bits_of(elements).data.cast("B")

    def _factors(self, at: int, stop: int) -> Array:
        """Return the scale of each element from number `at` to before `stop`, or the only one."""
        if self.block is None or self.grid is None:
            return self._scales(0, 1)
        columns = self.shape[-1]
        first, last = at // columns, (stop - 1) // columns
        if first == last:  # a part of one row, which may be long
            return self._of_rows(first, first + 1, at - first * columns, stop - first * columns).reshape(-1)
        if columns <= PIECE:
            made: Array = self._of_rows(first, last + 1, 0, columns).reshape(-1)
            return made[at - first * columns : stop - first * columns]
        halves = (self._factors(at, last * columns), self._factors(last * columns, stop))
        joined: Array = np.concatenate(halves)
        return joined

    def _of_rows(self, first: int, stop: int, left: int, right: int) -> Array:
        """Return the scales of some rows, counted over all axes but the last, and of some columns."""
        assert self.grid is not None
        assert self.block is not None
        size, (count, across), (rows, columns) = self.shape[-2], self.grid, self.block
        numbers = np.arange(first, stop)
        of_row = numbers // size * count + numbers % size // rows
        begin, end = int(of_row[0]), int(of_row[-1]) + 1
        begin_across, end_across = left // columns, (right - 1) // columns + 1
        if end - begin == 1:
            scales = self._scales(begin * across + begin_across, end_across - begin_across).reshape(1, -1)
        else:
            scales = self._scales(begin * across, (end - begin) * across).reshape(-1, across)
            scales = scales[:, begin_across:end_across]
        of_column = np.arange(left, right) // columns - begin_across
        made: Array = scales[(of_row - begin)[:, None], of_column[None, :]]
        return made

    def _scales(self, at: int, count: int) -> Array:
        data = reading.memory_of(self.scale.part(at * _WIDTH, count * _WIDTH))
        found: Array = reading.array_of(data, numpy_dtype("float32"))
        if not self.watch.seen and not np.isfinite(found).all():
            self.watch.seen = True
        return found


def products(
    weight: Storage, dtype: str, shape: Shape, scale: Storage, grid: Shape, block: tuple[int, int] | None
) -> Products:
    """Return the elements of a weight times their scales as a storage.

    Args:
        weight: its elements in row-major order.
        dtype: their dtype, which has one byte.
        shape: its shape.
        scale: the scales in row-major order, as float32.
        grid: their shape.
        block: the rows and columns of the weight that have one scale; None if all of its elements have one.
    """
    counts = None if block is None else ((grid[0], 1) if len(grid) == 1 else (grid[-2], grid[-1]))
    return Products(weight, dtype, shape, scale, counts, block, 0, prod(shape) * _WIDTH)
