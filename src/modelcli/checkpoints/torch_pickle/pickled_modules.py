"""An `nn.Module` pickled whole, as `torch.save(model)` does: told by its state, and never loaded.

Its tensors are those of the tables that every module keeps. What keeps them in a way of its own (a class with
`__reduce__` or `__getstate__`, a quantized module) is an error that names it: only running its code could tell more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from modelcli.checkpoints import limits
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.torch_pickle import composite_tensors
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef
from modelcli.errors import UnsafeError
from modelcli.model.tensors import Kind
from modelcli.wording import listed

_TABLES = ("_parameters", "_buffers", "_modules")
#: What makes a module of torch.fx again: its first argument is all that the module has.
_GRAPH_MODULES = frozenset(
    Global("torch.fx.graph_module", name)
    for name in ("reduce_graph_module", "reduce_package_graph_module", "reduce_deploy_graph_module")
)
#: What torch keeps packed weights in: nothing but torch itself opens one.
_SCRIPT_OBJECT = Global("torch", "ScriptObject")
#: What a name in a set takes in a file, at least.
_NAME = 4


@dataclass
class Whole:
    """What a pickled module holds: its tensors under the names that `state_dict()` gives them, which of them are
    buffers, and the names of its classes by path. `hidden` names what holds tensors that no state dict has."""

    tensors: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hidden: list[str] = field(default_factory=list)


def is_module(value: Any) -> bool:
    """Whether an inert value is a module whose tables are there to be read."""
    return _state_of(value) is not None


def _state_of(value: Any) -> dict[Any, Any] | None:
    """The attributes of a pickled module; None for anything else, and for one that is pickled in a way of its own."""
    if not isinstance(value, Opaque):
        return None
    state = value.state
    if isinstance(state, tuple) and len(state) == 2:  # a class with slots has those apart
        state = state[0]
    if isinstance(value.call, Global) and value.call in _GRAPH_MODULES and isinstance(value.args, tuple):
        state = value.args[0] if value.args else None
    if isinstance(state, dict) and all(isinstance(state.get(table), dict) for table in _TABLES):
        return state
    return None


def read(path: Path, root: Any, budget: limits.Budget) -> Whole:
    """The tensors of a pickled module. A module that stands at several places has its names at each, and so have all
    below it: each is paid for.

    Raises UnsafeError that names a child whose tensors cannot be told.
    """
    found = Whole()
    places: dict[int, tuple[str, dict[Any, Any]]] = {}
    # Modules still to be looked at, with their prefix and what they lie in; children stand on it last first.
    stack: list[tuple[Any, str, tuple[int, ...]]] = [(root, "", ())]
    while stack:
        module, prefix, above = stack.pop()
        limits.NESTING.check(len(above), f"{path}: its tree of modules")
        limits.check_name(prefix, str(path))
        state = _state_of(module)
        assert state is not None
        places.setdefault(id(module), (prefix, state))
        if isinstance(module.call, Global):
            name = "GraphModule" if module.call in _GRAPH_MODULES else module.call.name
            budget.spend(len(name))
            found.types[prefix.removesuffix(".")] = name
        _take_tensors(path, found, state, prefix, budget)
        inside = (*above, id(module))
        children = []
        for name, child in _named_in(path, state, "_modules", prefix, budget):
            if child is None or id(child) in inside:
                continue
            if not is_module(child):
                _refuse(path, prefix + name, child, "it is pickled in a way of its own")
            children.append((child, f"{prefix}{name}.", inside))
        stack += reversed(children)
    outside = _outside(path, found, places)
    found.notes = tuple(_told_of(outside))
    found.hidden += outside
    return found


def _take_tensors(path: Path, found: Whole, state: dict[Any, Any], prefix: str, budget: limits.Budget) -> None:
    """Take in what stands in the tables of parameters and buffers of one module."""
    hidden = _names_in_set(state.get("_non_persistent_buffers_set"), budget)
    tables: tuple[tuple[str, Kind], ...] = (("_parameters", "parameter"), ("_buffers", "buffer"))
    for table, kind in tables:
        for name, tensor in _named_in(path, state, table, prefix, budget):
            if tensor is None:
                continue
            if name in hidden:
                found.hidden.append(prefix + name)
                continue
            if not composite_tensors.is_tensor(tensor):
                _refuse(path, prefix + name, tensor, "nothing says which values it has")
            found.tensors[prefix + name] = tensor
            found.kinds[prefix + name] = kind


def _named_in(
    path: Path, state: dict[Any, Any], table: str, prefix: str, budget: limits.Budget
) -> Iterator[tuple[str, Any]]:
    """What a module has under names in one of its tables, which several modules may have in common."""
    for name, value in state[table].items():
        if not isinstance(name, str):
            _refuse(path, f"{prefix}{table}[{name!r:.40}]", value, "torch names its tensors and modules by texts alone")
        budget.spend(limits.ENTRY + len(prefix) + len(name))
        yield name, value


def _names_in_set(value: Any, budget: limits.Budget) -> set[str]:
    """The names in an inert set, however it was pickled."""
    if not isinstance(value, Opaque):
        return set()
    lists = [arg for arg in value.args[:1] if isinstance(arg, list)] if isinstance(value.args, tuple) else []
    names: set[str] = set()
    for items in (*lists, value.appended):
        budget.spend(_NAME * len(items))
        names.update(name for name in items if isinstance(name, str))
    return names


def _outside(path: Path, found: Whole, places: dict[int, tuple[str, dict[Any, Any]]]) -> list[str]:
    """The attributes of modules that hold tensors which stand in no table: no state dict has these."""
    shown = {id(tensor.storage) for tensor in found.tensors.values() if isinstance(tensor, TensorEntry)}
    shown |= {id(tensor) for tensor in found.tensors.values()}
    seen = set(places)
    names = []
    for prefix, state in places.values():
        for name, value in state.items():
            if name in _TABLES or not isinstance(name, str):
                continue
            if _holds_others(path, prefix + name, value, seen, shown):
                names.append(prefix + name)
    return names


def _holds_others(path: Path, name: str, value: Any, seen: set[int], shown: set[int]) -> bool:
    """Whether tensors lie in an attribute that are not shown. Each value is looked through once, wherever it stands."""
    stack = [value]
    found = False
    while stack:
        item = stack.pop()
        if isinstance(item, TensorEntry):
            found = found or id(item.storage) not in shown
            continue
        if isinstance(item, StorageRef):
            found = found or id(item.span) not in shown
            continue
        if isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen.add(id(item))
        if composite_tensors.makes_tensor(item):
            found = found or id(item) not in shown
        elif isinstance(item, Opaque):
            if item.call == _SCRIPT_OBJECT:
                _refuse(path, name, item, "it packs its weights in an object that only torch opens")
            stack += (item.args, item.state, *item.appended, *(part for pair in item.items for part in pair))
        elif isinstance(item, dict):
            stack += (*item.keys(), *item.values())
            if isinstance(item, OrderedDict):
                stack.append(item.state)
        elif isinstance(item, list | tuple):
            stack += item
    return found


#: What nothing lies in.
_LEAVES = (str, int, float, bytes, type(None), Global)


def _told_of(names: list[str]) -> list[str]:
    if not names:
        return []
    hold = "holds" if len(names) == 1 else "hold"
    return [
        f"{listed(names, 4)} {hold} tensors outside the parameters and buffers of its module: no state dict has them"
    ]


def _refuse(path: Path, name: str, value: Any, why: str) -> NoReturn:
    call = value.call if isinstance(value, Opaque) else None
    kind = call.name if isinstance(call, Global) else type(value).__name__
    raise UnsafeError(
        f"{path}: what {name} ({kind}) holds cannot be told: {why}, and to load it would run code",
        "save model.state_dict() where the model was made, and use that file",
    )
