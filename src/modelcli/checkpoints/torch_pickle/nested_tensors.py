"""Find tensors inside other entries of a state dict, such as weights that a quantized module packs in a tuple."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from modelcli.checkpoints import limits
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.torch_pickle import composite_tensors
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef

#: The types of values that contain no other values.
_LEAVES = (str, int, float, bytes, type(None), Global)


def tensors_within(
    extras: Mapping[str, Any], names: Collection[str], where: str, budget: limits.Budget
) -> tuple[dict[str, TensorEntry | CompositeEntry], list[str]]:
    """Return the tensors in lists, tuples and dicts, named as Python accesses them: `layer._packed_params[0]`.

    Args:
        extras: the entries that are not tensors.
        names: the names of all entries of the state dict.
        where: the file, for error messages.
        budget: what the file may still describe.

    Returns:
        The tensors by name; and the entries that contain a tensor whose name is already taken, or an object that only
        running code could tell from a tensor.
    """
    found: dict[str, TensorEntry | CompositeEntry] = {}
    opaque = []
    for name, value in extras.items():
        if isinstance(value, _LEAVES):
            continue
        if _hides_tensors(value, budget):
            opaque.append(name)
        if holds_tensors(value, budget):
            for inner_name, tensor in _walk(name, value, budget):
                if inner_name in names or inner_name in found:
                    opaque.append(name)  # one row cannot show two tensors
                    continue
                is_view = isinstance(tensor, TensorEntry | CompositeEntry)
                found[inner_name] = (
                    tensor if is_view else composite_tensors.entry_of(tensor, f"{where}: {inner_name}", budget)
                )
    return found, list(dict.fromkeys(opaque))


def _walk(name: str, value: Any, budget: limits.Budget) -> Iterator[tuple[str, Any]]:
    """Yield each tensor in a value with its name; a shared one under each of its names, which the budget pays for."""
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
    """Whether a value contains tensors, at any depth."""
    return any(_is_tensor(item) for item in _all_in(value, budget))


def may_hold_tensors(value: Any, budget: limits.Budget) -> bool:
    """Whether a value contains tensors, or objects that only running code could tell from tensors."""
    return any(_is_tensor(item) or composite_tensors.may_be_tensor(item) for item in _all_in(value, budget))


def _hides_tensors(value: Any, budget: limits.Budget) -> bool:
    """Whether a value contains tensors that Python cannot reach by name, or an object of a foreign class."""
    reached = {id(item) for _, item in _walk("", value, budget)} if holds_tensors(value, budget) else set()
    return any(
        id(item) not in reached if _is_tensor(item) else composite_tensors.may_be_tensor(item)
        for item in _all_in(value, budget)
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, CompositeEntry) or composite_tensors.is_tensor(value)


def _all_in(value: Any, budget: limits.Budget) -> Iterator[Any]:
    """Yield a value and all values in it, each once, but not those inside tensors.

    The budget pays for each traversal, because many entries may share one large value.
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
            children = [*item.keys(), *item.values()]
            if isinstance(item, OrderedDict):
                children.append(item.state)
        elif isinstance(item, list | tuple):
            children = [*item]
        elif isinstance(item, Opaque):
            pairs = [part for pair in item.items for part in pair]
            children = [item.call, item.args, item.state, *item.appended, *pairs]
        else:
            continue
        budget.spend(len(children))
        stack += children
