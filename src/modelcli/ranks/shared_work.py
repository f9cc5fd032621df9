"""Share out work on the values of tensors: each rank reads its part, and all ranks get all results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from modelcli.errors import ModelcliError
from modelcli.ranks.group import Group

_Key = TypeVar("_Key")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def shared(
    items: Mapping[_Key, _Item],
    labels: Sequence[str],
    sizes: Sequence[int],
    work: Callable[[Mapping[_Key, _Item]], Mapping[_Key, _Result]],
    group: Group,
    *,
    pack: Callable[[_Result], Any] = lambda result: result,
    unpack: Callable[[Any], _Result] = lambda found: found,
) -> dict[_Key, _Result]:
    """Return the results of `work` for items, each of which one rank works on. With one rank, this is `work(items)`.

    Args:
        items: the same on all ranks.
        labels: the name of each item.
        sizes: the bytes of each item.
        work: gets some of the items, and returns results for all or some of them.
        group: the ranks.
        pack: turns a result into something that JSON can hold.
        unpack: turns that into the result again.

    Raises the ModelcliError of the first rank whose `work` raised one, on all ranks.
    """
    if group.size == 1:
        return dict(work(items))
    from modelcli.ranks import messages
    from modelcli.ranks.connected import error_from_json, error_to_json
    from modelcli.ranks.sharing import in_runs

    digest = hashlib.sha256(repr(list(zip(labels, sizes, strict=True))).encode("utf-8", "surrogatepass"))
    group.require_same(digest.digest(), "list of tensors")
    keys = list(items)
    positions = {key: position for position, key in enumerate(keys)}
    own = {
        key: item
        for (key, item), rank in zip(items.items(), in_runs(sizes, group.size), strict=True)
        if rank == group.rank
    }
    group.moved(0, sum(sizes))
    try:
        found = work(own)
        answer: dict[str, Any] = {"found": [(positions[key], pack(result)) for key, result in found.items()]}
    except ModelcliError as error:
        answer = {"error": error_to_json(error)}
    results: dict[int, _Result] = {}
    for rank, data in enumerate(group.exchange("values", messages.packed(answer))):
        theirs = messages.unpacked(data)
        if "error" in theirs:
            raise group.of_rank(rank, error_from_json(theirs["error"]))
        results |= {position: unpack(result) for position, result in theirs["found"]}
    return {keys[position]: results[position] for position in sorted(results)}
