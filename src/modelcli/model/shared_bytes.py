"""Find the tensors of a model that share bytes: tied tensors, and overlapping views of a storage."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Hashable, Mapping

from modelcli.model.tensors import value_class


@value_class
class Shown:
    """The bytes of a storage that a tensor uses.

    Attributes:
        identity: a key that is equal for all names of a tensor.
        storage: a key of the storage; None for a quantized, sparse or empty tensor.
        start: the first byte.
        end: the byte after the last one.
    """

    identity: Hashable
    storage: Hashable | None
    start: int = 0
    end: int = 0


def tied(tensors: Mapping[str, Shown]) -> list[list[str]]:
    """Return groups of names whose tensors are the same or share bytes, in the model's order.

    Tensors side by side in one storage are not tied; a tensor without a plain storage is tied only to itself.
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
            part += start >= reached  # it begins after all before it, so it starts the next group
            reached = max(reached, end)
            groups.setdefault((number, part), []).append(name)
    order = {name: position for position, name in enumerate(tensors)}
    return [sorted(names, key=order.__getitem__) for names in groups.values()]


def sharing_bytes(tensors: Mapping[str, Shown], names: Collection[str]) -> dict[str, str]:
    """Return the other tensors that share bytes with the named ones, each with a named tensor whose bytes it shares.

    Other names of the same tensors are left out.
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
            count = bisect.bisect_left(starts, tensors[name].end)  # the spans that begin before this one ends
            if count and furthest[count - 1][1] > tensors[name].start:
                found[name] = furthest[count - 1][2]
    return found


def _further(first: tuple[int, int, str], second: tuple[int, int, str]) -> tuple[int, int, str]:
    """Return the span that ends later."""
    return second if second[1] > first[1] else first
