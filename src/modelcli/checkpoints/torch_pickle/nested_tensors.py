"""Tensors inside entries of a state dict that are no tensors: weights that a quantized module packs in a tuple."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from modelcli.checkpoints import limits
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.torch_pickle import composite_tensors
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef

#: What nothing lies in. As a tuple that is made once: a file may have 100,000 of them.
_LEAVES = (str, int, float, bytes, type(None), Global)


def tensors_within(
    extras: Mapping[str, Any], names: Collection[str], where: str, budget: limits.Budget
) -> tuple[dict[str, TensorEntry | CompositeEntry], list[str]]:
    """The tensors in lists, tuples and dicts, each named as Python reaches it: `layer._packed_params[0]`.

    Gives the names of those entries besides in which something lies that only code could tell from tensors, or a tensor
    that would be called as another one is. `names` are those of all entries of the state dict.
    """
    found: dict[str, TensorEntry | CompositeEntry] = {}
    unseen = []
    for name, value in extras.items():
        if isinstance(value, _LEAVES):
            continue
        if _hides_tensors(value, budget):
            unseen.append(name)
        if holds_tensors(value, budget):
            for inner_name, tensor in _walk(name, value, budget):
                if inner_name in names or inner_name in found:
                    unseen.append(name)  # one row cannot show two tensors
                    continue
                is_view = isinstance(tensor, TensorEntry | CompositeEntry)
                found[inner_name] = (
                    tensor if is_view else composite_tensors.entry_of(tensor, f"{where}: {inner_name}", budget)
                )
    return found, list(dict.fromkeys(unseen))


def _walk(name: str, value: Any, budget: limits.Budget) -> Iterator[tuple[str, Any]]:
    """Every tensor in a value with its name. One that stands at several places has a name at each, and is paid for."""
    stack: list[tuple[str, Any]] = [(name, value)]
    while stack:
        path, item = stack.pop()
        budget.spend(limits.ENTRY + len(path))
        if _is_tensor(item):
            yield path, item
        elif isinstance(item, dict):
            stack += reversed(
                [(f"{path}[{key!r}]", below) for key, below in item.items() if isinstance(key, str | int)]
            )
        elif isinstance(item, list | tuple):
            stack += reversed([(f"{path}[{index}]", below) for index, below in enumerate(item)])


def holds_tensors(value: Any, budget: limits.Budget) -> bool:
    """Whether tensors lie in a value, wherever."""
    return any(_is_tensor(item) for item in _all_in(value, budget))


def may_hold_tensors(value: Any, budget: limits.Budget) -> bool:
    """Whether tensors lie in a value, or what only running code could tell from one."""
    return any(_is_tensor(item) or composite_tensors.may_be_tensor(item) for item in _all_in(value, budget))


def _hides_tensors(value: Any, budget: limits.Budget) -> bool:
    """Whether a value holds tensors out of reach, or an object of a foreign class, which only code could look into."""
    reached = {id(item) for _, item in _walk("", value, budget)} if holds_tensors(value, budget) else set()
    return any(
        id(item) not in reached if _is_tensor(item) else composite_tensors.may_be_tensor(item)
        for item in _all_in(value, budget)
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, CompositeEntry) or composite_tensors.is_tensor(value)


def _all_in(value: Any, budget: limits.Budget) -> Iterator[Any]:
    """A value and all that lies in it, each once; tensors are not looked into.

    Many entries may have one large value in common: each look through it is paid for.
    """
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, StorageRef) or _is_tensor(item):
            continue
        if isinstance(item, dict):
            within = [*item.keys(), *item.values()]
            if isinstance(item, OrderedDict):
                within.append(item.state)
        elif isinstance(item, list | tuple):
            within = [*item]
        elif isinstance(item, Opaque):
            pairs = [part for pair in item.items for part in pair]
            within = [item.call, item.args, item.state, *item.appended, *pairs]
        else:
            continue
        budget.spend(len(within))
        stack += within
