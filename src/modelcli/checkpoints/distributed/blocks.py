"""Tensors that processes saved block by block: as columns, or as the blocks of a two-dimensional device mesh."""

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
    """A part of a tensor: `sizes` elements along each dimension, from `offsets`; `storage` has them row-major."""

    offsets: Shape
    sizes: Shape
    storage: Storage


@dataclass(frozen=True, slots=True)
class Blocks:
    """The bytes of a row-major tensor of `shape`, put together from blocks that cover it exactly once.

    An element takes `item` bytes. The blocks are put together in memory, as `torch.distributed.checkpoint.load` does;
    these are the `nbytes` from `start`.
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
        """A copy. Of each block that has some of these bytes, what lies from the first of them to the last is read."""
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
        """The longest runs of a block that lie in one piece: where in it, where in the tensor, how many bytes.

        Those that lie along the first dimension outside the bytes from `start` to `stop` are left out.
        """
        # Behind the last dimension that is cut, all that a block has lies together.
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
    """The bytes of a whole tensor."""
    return Blocks(shape, item, tuple(blocks), 0, prod(shape) * item)
