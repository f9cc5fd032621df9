"""Join tensors that processes saved as blocks: as rows, as columns, or as those of a two-dimensional device mesh."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from operator import mul
from typing import Protocol

from modelcli.checkpoints import limits, shapes
from modelcli.checkpoints.storage import CHUNK, FileId, JoinedSpan, Storage, Windows
from modelcli.model.tensors import Shape

#: What a corner of a block costs a budget.
_CORNER = 8


class Rectangle(Protocol):
    """A rectangular part of a tensor: `sizes` elements along each dimension, from `offsets`."""

    @property
    def offsets(self) -> Shape: ...

    @property
    def sizes(self) -> Shape: ...


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a tensor: `sizes` elements along each dimension, from `offsets`, row-major in `storage`."""

    offsets: Shape
    sizes: Shape
    storage: Storage


@dataclass(frozen=True, slots=True)
class Blocks:
    """The bytes of a row-major tensor, joined from blocks that cover it exactly once.

    They are joined in memory, a piece at a time: of a tensor that is written, never more than one piece.

    Attributes:
        shape: the shape of the tensor.
        item: the size of an element in bytes.
        blocks: the blocks.
        start: the first byte of the tensor that this storage stands for.
        nbytes: the number of bytes that it stands for.
    """

    shape: Shape
    item: int
    blocks: tuple[Block, ...]
    start: int
    nbytes: int

    def files(self) -> Iterable[FileId]:
        return {file for block in self.blocks for file in block.storage.files()}

    def chunks(self) -> Iterator[bytes | memoryview]:
        for start in range(0, self.nbytes, CHUNK):
            yield self.part(start, min(CHUNK, self.nbytes - start)).mapped()

    def bytes(self) -> bytes:
        return bytes(self.mapped())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """Return a copy. Of each block, only the range from its first needed byte to its last is read."""
        made = memoryview(bytearray(self.nbytes))
        stop = self.start + self.nbytes
        for block in self.blocks:
            parts = [
                (here + max(self.start - there, 0), max(there, self.start), min(there + length, stop))
                for here, there, length in self._runs(block, self.start, stop)
            ]
            if parts:
                begin, end = parts[0][0], parts[-1][0] + parts[-1][2] - parts[-1][1]
                found = block.storage.part(begin, end - begin).mapped()
                for here, first, last in parts:
                    made[first - self.start : last - self.start] = found[here - begin : here - begin + last - first]
        return made

    def part(self, start: int, nbytes: int) -> Blocks:
        return Blocks(self.shape, self.item, self.blocks, self.start + start, nbytes)

    def _runs(self, block: Block, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the longest runs of a block that are contiguous in the tensor and have bytes from `start` to `stop`.

        Each run is its offset in the block, its offset in the tensor, and its length, all in bytes.
        """
        # After the last dimension in which the block is smaller than the tensor, its elements are contiguous.
        cut = max((axis for axis, size in enumerate(block.sizes) if size != self.shape[axis]), default=0)
        steps = [step * self.item for step in shapes.row_major(self.shape)]
        length = prod(block.sizes[cut:]) * self.item
        first = sum(map(mul, block.offsets, steps))
        if not cut:
            yield 0, first, length
            return

        def offset_of(number: int) -> int:
            """Return the offset of a run in the tensor, which grows with its number."""
            offset: int = first
            for size, step in zip(block.sizes[cut - 1 :: -1], steps[cut - 1 :: -1], strict=True):
                number, index = divmod(number, size)
                offset += index * step
            return offset

        runs = range(prod(block.sizes[:cut]))
        number = bisect_left(runs, start - length + 1, key=offset_of)
        last = bisect_left(runs, stop, lo=number, key=offset_of)
        step, inner = steps[cut - 1], block.sizes[cut - 1]
        while number < last:
            count = min(inner - number % inner, last - number)
            there = offset_of(number)
            for index in range(count):
                yield (number + index) * length, there + index * step, length
            number += count


def joined(shape: Shape, item: int, blocks: Sequence[Block]) -> Storage:
    """Return the bytes of a tensor: its blocks one behind another if each is contiguous in it.

    Args:
        shape: its shape.
        item: the size of an element in bytes.
        blocks: its blocks, which cover it exactly once (`cover_once`).
    """
    starts = [_run_start(shape, block) for block in blocks]
    if any(start is None for start in starts):
        return Blocks(shape, item, tuple(blocks), 0, prod(shape) * item)
    if len(blocks) == 1:
        return blocks[0].storage
    ordered = sorted(zip(starts, range(len(blocks)), strict=True))
    return JoinedSpan(tuple(blocks[number].storage for _, number in ordered))


def _run_start(shape: Shape, block: Block) -> int | None:
    """Return the first element of a block in the row-major tensor; None if the block is not contiguous there."""
    first = next((axis for axis, size in enumerate(block.sizes) if size != 1), len(shape))
    if block.sizes[first + 1 :] != shape[first + 1 :]:
        return None
    start: int = sum(map(mul, block.offsets, shapes.row_major(shape)))
    return start


def cover_once(shape: Shape, blocks: Sequence[Rectangle], budget: limits.Budget) -> bool:
    """Whether blocks fill a shape without gaps or overlaps; each is inside it.

    They do if the alternating sum over the corners of all blocks equals that of the whole shape: the corners determine
    how often each element is covered, as differences determine a function. `budget` is charged for the corners.
    """
    if len(blocks) == 1:
        return blocks[0].sizes == shape
    cut = [axis for axis, size in enumerate(shape) if any(block.sizes[axis] != size for block in blocks)]
    budget.spend(_CORNER * len(blocks) * 2 ** len(cut))
    corners: Counter[Shape] = Counter()
    ends = list(itertools.product((0, 1), repeat=len(cut)))
    whole = [((0,) * len(shape), shape, -1)]
    for offsets, sizes, times in (*whole, *((block.offsets, block.sizes, 1) for block in blocks)):
        for end in ends:
            point = tuple(offsets[axis] + sizes[axis] * far for axis, far in zip(cut, end, strict=True))
            corners[point] += times * (-1) ** sum(end)
    return not any(corners.values())
