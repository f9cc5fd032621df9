"""A simulation of the caching allocator with which torch hands out memory of a GPU.

It follows `c10/cuda/CUDACachingAllocator.cpp` of PyTorch with its default settings: sizes are rounded to 512 bytes; a
block of up to 1 MiB comes from a segment of 2 MiB, a larger one from a segment of 20 MiB or, from 10 MiB on, from one
of its own that is rounded to 2 MiB; the free block that fits best is taken; it is split unless the rest would be too
small; freed neighbours become one block. The device itself never runs out of memory here, so no segment is given back.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

#: The unit of block sizes (`kMinBlockSize`).
ROUNDING = 512
#: The largest block of the small pool (`kSmallSize`), and its segments (`kSmallBuffer`).
_SMALL, _SMALL_SEGMENT = 1 << 20, 2 << 20
#: Below this (`kMinLargeAlloc`), a large block comes from a segment of this size (`kLargeBuffer`).
_LARGE, _LARGE_SEGMENT = 10 << 20, 20 << 20
#: Segments of larger blocks are rounded to this (`kRoundLarge`).
_ROUND_SEGMENT = 2 << 20


def rounded(nbytes: int) -> int:
    """Return the bytes of a block in which `nbytes` are stored; nothing takes no block."""
    return -(-nbytes // ROUNDING) * ROUNDING


@dataclass(slots=True, eq=False)
class _Block:
    """A block of a segment. `address` orders blocks; `before` and `after` are its neighbours in the segment."""

    address: int
    size: int
    is_small: bool
    is_free: bool = True
    before: _Block | None = None
    after: _Block | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.address


class CachingAllocator:
    """Hands out blocks as torch's allocator does, and counts what is handed out and what is reserved.

    Attributes:
        allocated: the bytes of the blocks that are handed out now: `torch.cuda.memory_allocated`.
        reserved: the bytes of all segments: `torch.cuda.memory_reserved`.
    """

    def __init__(self) -> None:
        self.allocated = 0
        self.reserved = 0
        self._next_address = 0
        #: The free blocks of the large and of the small pool, in the order of size and address.
        self._free: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._by_address: dict[int, _Block] = {}

    def rounded(self, nbytes: int) -> int:
        """Return the bytes of a block for `nbytes` that needs no part of another one."""
        return rounded(nbytes)

    def allocate(self, nbytes: int) -> _Block | None:
        """Hand out a block of at least `nbytes`; None if nothing is asked for."""
        if nbytes <= 0:
            return None
        size = rounded(nbytes)
        is_small = size <= _SMALL
        block = self._taken(size, is_small) or self._new_segment(size, is_small)
        rest = block.size - size
        if rest >= ROUNDING if is_small else rest > _SMALL:
            self._split(block, size)
        block.is_free = False
        self.allocated += block.size
        return block

    def release(self, block: _Block | None) -> None:
        """Take a block back."""
        if block is None:
            return
        self.allocated -= block.size
        block.is_free = True
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                self._remove(other)
                block = _merged(block, other)
        self._by_address[block.address] = block
        bisect.insort(self._free[block.is_small], block.key)

    def _taken(self, size: int, is_small: bool) -> _Block | None:
        """Take the smallest free block that is large enough out of its pool."""
        free = self._free[is_small]
        index = bisect.bisect_left(free, (size, -1))
        return self._by_address.pop(free.pop(index)[1]) if index < len(free) else None

    def _new_segment(self, size: int, is_small: bool) -> _Block:
        if is_small:
            whole = _SMALL_SEGMENT
        elif size < _LARGE:
            whole = _LARGE_SEGMENT
        else:
            whole = -(-size // _ROUND_SEGMENT) * _ROUND_SEGMENT
        block = _Block(self._next_address, whole, is_small)
        self._next_address += whole
        self.reserved += whole
        return block

    def _split(self, block: _Block, size: int) -> None:
        """Keep `size` bytes of a block, and put the rest into the pool."""
        rest = _Block(block.address + size, block.size - size, block.is_small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._by_address[rest.address] = rest
        bisect.insort(self._free[rest.is_small], rest.key)

    def _remove(self, block: _Block) -> None:
        free = self._free[block.is_small]
        free.pop(bisect.bisect_left(free, block.key))
        del self._by_address[block.address]


def _merged(block: _Block, other: _Block) -> _Block:
    """Return one block in the place of two neighbours."""
    first, second = (other, block) if other.address < block.address else (block, other)
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    first.is_free = True
    return first
