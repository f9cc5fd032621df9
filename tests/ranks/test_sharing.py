"""Who gets what: every item has one rank, all ranks compute the same, and no rank has much more than its part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelcli.ranks.sharing import evenly, in_runs

_SIZES = st.lists(st.integers(0, 10**12), max_size=200)


@given(_SIZES, st.integers(1, 70))
def test_evenly_bounds_the_largest_load(sizes: list[int], count: int):
    ranks = evenly(sizes, count)
    loads = [sum(size for size, rank in zip(sizes, ranks, strict=True) if rank == number) for number in range(count)]
    assert sum(loads) == sum(sizes)
    # Graham's bound for any list: the mean, and the largest item less its part of the mean.
    assert max(loads) <= sum(sizes) / count + max(sizes, default=0) + len(sizes)


def test_evenly_gives_alike_shards_out_one_by_one():
    assert sorted(evenly([5_000_000_000] * 163, 64).count(rank) for rank in range(64)) == [2] * 29 + [3] * 35


@given(_SIZES, st.integers(1, 70))
def test_runs_are_in_order_and_about_equal(sizes: list[int], count: int):
    ranks = in_runs(sizes, count)
    assert ranks == sorted(ranks)
    assert all(0 <= rank < count for rank in ranks)
    weights = [max(size, 1) for size in sizes]
    for number in range(count):
        load = sum(weight for weight, rank in zip(weights, ranks, strict=True) if rank == number)
        assert load <= sum(weights) / count + max(weights, default=0)
