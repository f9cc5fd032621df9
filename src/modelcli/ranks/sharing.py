"""Decide which rank gets which item, by the bytes of the items. All ranks compute the same answer."""

from __future__ import annotations

from collections.abc import Sequence


def evenly(sizes: Sequence[int], count: int) -> list[int]:
    """Return the rank of each item: the largest one first, each to the rank that has the fewest bytes so far.

    The rank with the most bytes has at most 4/3 of what the best sharing gives it: R. L. Graham, "Bounds on
    Multiprocessing Timing Anomalies", SIAM Journal on Applied Mathematics 17, 1969.

    Args:
        sizes: the bytes of each item.
        count: the number of ranks.
    """
    import heapq

    ranks = [0] * len(sizes)
    loads = [(0, rank) for rank in range(count)]
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        load, rank = loads[0]
        ranks[item] = rank
        heapq.heapreplace(loads, (load + max(sizes[item], 1), rank))
    return ranks


def in_runs(sizes: Sequence[int], count: int) -> list[int]:
    """Return the rank of each item, where each rank gets neighbours: they are likely to be in the same file.

    An item belongs to the rank in whose equal part of all bytes its middle is.

    Args:
        sizes: the bytes of each item.
        count: the number of ranks.
    """
    weights = [max(size, 1) for size in sizes]
    total, before = sum(weights), 0
    ranks = []
    for weight in weights:
        ranks.append(min((2 * before + weight) * count // (2 * total), count - 1))
        before += weight
    return ranks
