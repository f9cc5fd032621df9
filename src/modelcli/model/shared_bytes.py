"""Which tensors of a model show the same bytes: those that are one, and views of one storage that overlap."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Hashable, Mapping

from modelcli.model.tensors import value_class


@value_class
class Shown:
    """What a tensor shows: the bytes from `start` to before `end` of a storage.

    `identity` is equal for all names of a tensor. `storage` is None for a tensor that shows no bytes of a storage:
    a quantized or sparse one, and one without elements.
    """

    identity: Hashable
    storage: Hashable | None
    start: int = 0
    end: int = 0


def tied(tensors: Mapping[str, Shown]) -> list[list[str]]:
    """The names of tensors that are one, or that show some of the same bytes: a group for each, in their order.

    Tensors that lie side by side in one storage are not tied; what has no storage of its own is tied to itself alone.
    """
    groups: dict[object, list[str]] = {}
    by_storage: dict[Hashable, list[str]] = {}
    for name, shown in tensors.items():
        if shown.storage is not None:
            by_storage.setdefault(shown.storage, []).append(name)
        else:
            groups.setdefault((None, shown.identity), []).append(name)
    for number, names in enumerate(by_storage.values()):
        reached, part = 0, 0
        for start, end, name in sorted((tensors[name].start, tensors[name].end, name) for name in names):
            part += start >= reached  # behind all before it: the next group
            reached = max(reached, end)
            groups.setdefault((number, part), []).append(name)
    order = {name: position for position, name in enumerate(tensors)}
    return [sorted(names, key=order.__getitem__) for names in groups.values()]


def shown_too(tensors: Mapping[str, Shown], names: Collection[str]) -> dict[str, str]:
    """The other tensors that show some of the bytes of these, each with the first of these whose bytes it shows.

    Names of one and the same tensor are no others.
    """
    own = {tensors[name].identity for name in names}
    spans: dict[Hashable, list[tuple[int, int, str]]] = {}
    rest: dict[Hashable, list[str]] = {}
    for name, shown in tensors.items():
        if shown.storage is None:
            continue
        if name in names:
            spans.setdefault(shown.storage, []).append((shown.start, shown.end, name))
        elif shown.identity not in own:
            rest.setdefault(shown.storage, []).append(name)
    found = {}
    for storage, others in rest.items():
        if storage not in spans:
            continue
        chosen = sorted(spans[storage])
        starts = [start for start, _, _ in chosen]
        furthest = list(itertools.accumulate(chosen, _further))
        for name in others:
            count = bisect.bisect_left(starts, tensors[name].end)  # of the others none begins before this one ends
            if count and furthest[count - 1][1] > tensors[name].start:
                found[name] = furthest[count - 1][2]
    return found


def _further(first: tuple[int, int, str], second: tuple[int, int, str]) -> tuple[int, int, str]:
    """Of two spans the one that ends later."""
    return second if second[1] > first[1] else first
