"""Join tensors that processes saved as blocks: as columns, or as the blocks of a two-dimensional device mesh."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from modelcli.checkpoints import shapes
from modelcli.checkpoints.storage import CHUNK, FileId, Storage, Windows
from modelcli.model.tensors import Shape


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a tensor: `sizes` elements along each dimension, from `offsets`, row-major in `storage`."""

    offsets: Shape
    sizes: Shape
    storage: Storage


@dataclass(frozen=True, slots=True)
class Blocks:
    """The bytes of a row-major tensor, joined from blocks that cover it exactly once.

    The blocks are joined in memory, as `torch.distributed.checkpoint.load` does.

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

    def chunks(self) -> Iterator[bytes]:
        whole = self.mapped()
        for start in range(0, self.nbytes, CHUNK):
            yield bytes(whole[start : start + CHUNK])

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
                if there < stop and there + length > self.start
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
        """Yield the longest runs of a block that are contiguous in the tensor.

        Each run is its offset in the block, its offset in the tensor, and its length, all in bytes. Runs whose index
        along the first dimension is outside the bytes from `start` to `stop` are left out.
        """
        # After the last dimension in which the block is smaller than the tensor, its elements are contiguous.
        cut = max((axis for axis, size in enumerate(block.sizes) if size != self.shape[axis]), default=0)
        steps = shapes.row_major(self.shape)
        length = prod(block.sizes[cut:]) * self.item
        first = sum(offset * step for offset, step in zip(block.offsets, steps, strict=True)) * self.item
        ranges = [range(size) for size in block.sizes[:cut]]
        before = 0
        if ranges:
            stride = steps[0] * self.item
            low, high = max((start - first) // stride, 0), -(-(stop - first) // stride)
            before = min(low, len(ranges[0])) * prod(block.sizes[1:cut])
            ranges[0] = ranges[0][low : max(high, low)]
        for number, index in enumerate(itertools.product(*ranges), before):
            yield number * length, first + sum(map(int.__mul__, index, steps)) * self.item, length


def storage_of(shape: Shape, item: int, blocks: Sequence[Block]) -> Blocks:
    """Return the storage of a whole tensor that consists of blocks."""
    return Blocks(shape, item, tuple(blocks), 0, prod(shape) * item)
