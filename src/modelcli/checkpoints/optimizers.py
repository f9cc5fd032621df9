"""Find the state dicts of optimizers in a training checkpoint, and read them as torch.optim would.

A state dict of `torch.optim` has `state`, a dict from the id of a parameter to its state, and `param_groups`, a list of
dicts whose `params` are ids: numbers over all groups, in the order in which the optimizer got its parameters.
torch.distributed writes the names of parameters as ids. An optimizer that got names with its parameters
(`Adam(model.named_parameters())`) also has a list of them in `param_names`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.torch_pickle.inert_values import OrderedDict
from modelcli.model.tensors import Shape
from modelcli.wording import brief_repr

#: How deep in a checkpoint an optimizer is searched for; a program that has several keeps them in lists or dicts.
_DEPTH = 8


@dataclass(frozen=True)
class Optimizer:
    """The state dict of an optimizer in a training checkpoint.

    Attributes:
        path: the keys and indices that lead to it.
        value: the dict itself.
        fault: why torch could not load it; empty if it could.
    """

    path: tuple[str | int, ...]
    value: Mapping[Any, Any]
    fault: str = ""

    @property
    def place(self) -> str:
        """Where it is, as text: `optimizer`, `optimizer_states[0]`."""
        if not self.path:
            return "the file"
        return str(self.path[0]) + "".join(f"[{step!r}]" for step in self.path[1:])

    @property
    def state(self) -> Mapping[Any, Any]:
        return self.value["state"]  # type: ignore[no-any-return]

    @property
    def groups(self) -> Sequence[Mapping[str, Any]]:
        return self.value["param_groups"]  # type: ignore[no-any-return]

    @property
    def ids(self) -> list[list[int | str]]:
        """The ids of each group's parameters."""
        return [list(group["params"]) for group in self.groups]

    @property
    def is_by_name(self) -> bool:
        """Whether the ids are names of parameters."""
        return any(isinstance(own, str) for ids in self.ids for own in ids)

    @property
    def names(self) -> list[list[str]] | None:
        """The names of each group's parameters, if the optimizer knows them."""
        if self.fault:
            return None
        if self.is_by_name:
            return [list(map(str, ids)) for ids in self.ids]
        if not any("param_names" in group for group in self.groups):
            return None
        return [list(group["param_names"]) for group in self.groups]


def optimizers_in(tree: Any, own: Sequence[str | int] = ()) -> list[Optimizer]:
    """Return the optimizers in a training checkpoint, each once. `own` is the path of the model's state dict."""
    found: list[Optimizer] = []
    seen: set[int] = set()
    level: list[tuple[tuple[str | int, ...], Any]] = [((), tree)]
    for _ in range(_DEPTH):
        deeper: list[tuple[tuple[str | int, ...], Any]] = []
        for path, value in level:
            if id(value) in seen or (path and path == tuple(own)):
                continue
            seen.add(id(value))
            if isinstance(value, dict) and "state" in value and "param_groups" in value:
                found.append(Optimizer(path, value, _fault(value)))
                continue
            for key, item in _items(value):
                if isinstance(item, dict | list | tuple) and item:
                    deeper.append(((*path, key), item))
        level = deeper
    return found


def _items(value: Any) -> Sequence[tuple[Any, Any]]:
    if isinstance(value, dict):
        return [(key, item) for key, item in value.items() if isinstance(key, str | int)]
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _fault(value: Mapping[Any, Any]) -> str:
    """Return why a dict with `state` and `param_groups` is not as `torch.optim` writes it; empty if it is."""
    state, groups = value["state"], value["param_groups"]
    if not isinstance(state, dict):
        return f"its state is {brief_repr(state)}, not a dict"
    if not isinstance(groups, list | tuple):
        return f"its param_groups are {brief_repr(groups)}, not a list"
    ids: list[Any] = []
    for number, group in enumerate(groups):
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(params, list | tuple):
            return f"param_groups[{number}] has no list params"
        ids += params
        if "param_names" in group or (groups and "param_names" in groups[0]):
            names = group.get("param_names")
            if not isinstance(names, list | tuple) or len(names) != len(params) or set(map(type, names)) - {str}:
                return f"param_groups[{number}] has not one of its param_names for each of its params"
    kinds = set(map(type, ids))
    if len(kinds) > 1 or kinds - {int, str}:
        odd = next((own for own in ids if type(own) is not type(ids[0]) or type(own) not in (int, str)), ids[0])
        return f"{brief_repr(odd)} in its params is no number like the others"
    if len(set(ids)) < len(ids):
        return "a parameter is in its params twice"
    known = set(ids)
    unknown = next((own for own in state if type(own) is int and own not in known), None)
    if unknown is not None:
        return f"it has state for a parameter {unknown} that is in no group"
    return ""


def shapes_in(entry: Any) -> set[Shape]:
    """Return the shapes of the tensors in the state of one parameter, without scalars such as the step."""
    if not isinstance(entry, dict):
        return set()
    tensors = (value for value in entry.values() if isinstance(value, TensorEntry | CompositeEntry))
    return {tuple(value.shape) for value in tensors if value.shape}


def with_values(tree: Any, new: Mapping[int, Any]) -> Any:
    """Return a tree in which some dicts are others. `new` has the new ones by the `id` of the old ones."""
    known: dict[int, Any] = dict(new)

    def value_of(value: Any, depth: int) -> Any:
        if id(value) in known:
            return known[id(value)]
        if not isinstance(value, dict | list | tuple) or depth > _DEPTH:
            return value
        known[id(value)] = value  # for a value that contains itself
        items = list(value.values()) if isinstance(value, dict) else list(value)
        made = [value_of(item, depth + 1) for item in items]
        if any(one is not other for one, other in zip(items, made, strict=True)):
            known[id(value)] = _like(value, made)
        return known[id(value)]

    return value_of(tree, 0)


def _like(value: Any, items: Sequence[Any]) -> Any:
    """Return a container of the same kind and with the same keys as another, with other values."""
    if not isinstance(value, dict):
        return type(value)(items)
    pairs = zip(value, items, strict=True)
    if not isinstance(value, OrderedDict):
        return dict(pairs)
    made = OrderedDict(pairs)
    made.state = value.state
    return made


__all__ = ["Optimizer", "optimizers_in", "shapes_in", "with_values"]
