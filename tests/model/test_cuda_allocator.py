"""The simulation of the caching allocator, against sizes that follow from the constants in CUDACachingAllocator.cpp."""

from __future__ import annotations

import itertools
import random
from typing import Any

from modelcli.model.cuda_allocator import CachingAllocator

KIB, MIB = 1024, 1024 * 1024


def test_small_blocks_are_rounded_to_512_bytes_and_share_segments_of_2_mib() -> None:
    allocator = CachingAllocator()
    allocator.allocate(1)
    assert (allocator.allocated, allocator.reserved) == (512, 2 * MIB)
    allocator.allocate(513)
    assert (allocator.allocated, allocator.reserved) == (512 + 1024, 2 * MIB)
    allocator.allocate(MIB)
    assert allocator.reserved == 2 * MIB
    allocator.allocate(MIB)
    assert allocator.reserved == 4 * MIB


def test_nothing_takes_no_memory() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(0))
    assert allocator.allocated == allocator.reserved == 0


def test_large_blocks_share_segments_of_20_mib() -> None:
    allocator = CachingAllocator()
    for count in range(1, 6):
        allocator.allocate(4 * MIB)
        assert allocator.reserved == (20 * MIB if count <= 5 else 40 * MIB)
    allocator.allocate(2 * MIB)
    assert (allocator.allocated, allocator.reserved) == (22 * MIB, 40 * MIB)


def test_blocks_from_10_mib_on_have_segments_of_their_own() -> None:
    allocator = CachingAllocator()
    allocator.allocate(11 * MIB + 1)
    assert allocator.reserved == 12 * MIB
    assert allocator.allocated == 12 * MIB  # the rest is less than 1 MiB, so the block is not split
    allocator.allocate(12 * MIB + 512 * KIB)
    assert allocator.reserved == 26 * MIB
    assert allocator.allocated == 12 * MIB + 12 * MIB + 512 * KIB  # the rest is 1.5 MiB
    allocator.allocate(MIB + 512)
    assert allocator.reserved == 26 * MIB


def test_the_smallest_block_that_fits_is_taken_and_neighbours_merge() -> None:
    allocator = CachingAllocator()
    first, second, third = (allocator.allocate(64 * KIB) for _ in range(3))
    allocator.release(first)
    allocator.release(third)  # merges with the rest of the segment
    again = allocator.allocate(64 * KIB)
    assert again is not None
    assert again.address == 0
    allocator.release(again)
    allocator.release(second)
    whole = allocator.allocate(MIB)
    assert whole is not None
    assert whole.address == 0
    assert allocator.reserved == 2 * MIB


def test_random_work_never_overlaps_and_leaves_nothing() -> None:
    random.seed(0)
    allocator = CachingAllocator()
    held: list[Any] = []
    for _ in range(2000):
        if held and random.random() < 0.5:
            allocator.release(held.pop(random.randrange(len(held))))
        else:
            held.append(
                allocator.allocate(random.choice([1, 700, 90_000, 2_000_000, 15_000_000]) + random.randrange(999))
            )
        spans = sorted((block.address, block.address + block.size) for block in held)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert allocator.allocated == sum(end - start for start, end in spans) <= allocator.reserved
    for block in held:
        allocator.release(block)
    assert allocator.allocated == 0
