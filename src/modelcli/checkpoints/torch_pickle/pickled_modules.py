"""Read an `nn.Module` that was pickled as a whole, as `torch.save(model)` does, from its recorded state.

Nothing is unpickled. The tensors come from the `_parameters`, `_buffers` and `_modules` of each module. A module that
stores its tensors in another way (a class with `__reduce__` or `__getstate__`, a quantized module) is an error that
names it, because only its code could read them.
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
from modelcli.wording import brief_repr, listed

_TABLES = ("_parameters", "_buffers", "_modules")
#: The functions that unpickle a module of torch.fx. Their first argument is the module's `__dict__`.
_GRAPH_MODULES = frozenset(
    Global("torch.fx.graph_module", name)
    for name in ("reduce_graph_module", "reduce_package_graph_module", "reduce_deploy_graph_module")
)
#: The class of torch's packed weights, which only torch itself can read.
_SCRIPT_OBJECT = Global("torch", "ScriptObject")
#: The least number of bytes that a name in a set takes in a file.
_NAME = 4


@dataclass
class PickledModule:
    """The content of a pickled module.

    Attributes:
        tensors: its tensors, by their keys in `state_dict()`.
        kinds: whether each of them is a parameter or a buffer.
        types: the name of the class of each module, by path.
        notes: notes for the user.
        hidden: the attributes with tensors that are not in the state dict.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hidden: list[str] = field(default_factory=list)


def is_module(value: Any) -> bool:
    """Whether an inert value is a module whose parameters, buffers and submodules can be read."""
    return _state_of(value) is not None


def _state_of(value: Any) -> dict[Any, Any] | None:
    """Return the attributes of a pickled module; None for another value or a module that pickles itself differently."""
    if not isinstance(value, Opaque):
        return None
    state = value.state
    if isinstance(state, tuple) and len(state) == 2:  # the second dict has the slots of its class
        state = state[0]
    if isinstance(value.call, Global) and value.call in _GRAPH_MODULES and isinstance(value.args, tuple):
        state = value.args[0] if value.args else None
    if isinstance(state, dict) and all(isinstance(state.get(table), dict) for table in _TABLES):
        return state
    return None


def read(path: Path, root: Any, budget: limits.Budget) -> PickledModule:
    """Read the tensors of a pickled module.

    A shared module is listed under each of its paths, with all of its submodules; `budget` is charged for each. Raises
    UnsafeError for a submodule or tensor that only running code could read.
    """
    found = PickledModule()
    seen: dict[int, tuple[str, dict[Any, Any]]] = {}
    # The modules still to read, with their prefix and the modules that contain them; the first child is on top.
    stack: list[tuple[Any, str, tuple[int, ...]]] = [(root, "", ())]
    while stack:
        module, prefix, parents = stack.pop()
        limits.NESTING.check(len(parents), f"{path}: its tree of modules")
        limits.check_name(prefix, str(path))
        state = _state_of(module)
        assert state is not None
        seen.setdefault(id(module), (prefix, state))
        if isinstance(module.call, Global):
            name = "GraphModule" if module.call in _GRAPH_MODULES else module.call.name
            budget.spend(len(name))
            found.types[prefix.removesuffix(".")] = name
        _take_tensors(path, found, state, prefix, budget)
        path_of_ids = (*parents, id(module))
        children = []
        for name, child in _named_in(path, state, "_modules", prefix, budget):
            if child is None or id(child) in path_of_ids:
                continue
            if not is_module(child):
                _refuse(path, prefix + name, child, "its class does not keep its tensors as modules do")
            children.append((child, f"{prefix}{name}.", path_of_ids))
        stack += reversed(children)
    names = _attributes_with_tensors(path, found, seen)
    found.notes = tuple(_notes_about(names))
    found.hidden += names
    return found


def _take_tensors(path: Path, found: PickledModule, state: dict[Any, Any], prefix: str, budget: limits.Budget) -> None:
    """Add the parameters and buffers of one module to `found`."""
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
                _refuse(path, prefix + name, tensor, "it is not a tensor of a kind that modelcli can read")
            found.tensors[prefix + name] = tensor
            found.kinds[prefix + name] = kind


def _named_in(
    path: Path, state: dict[Any, Any], table: str, prefix: str, budget: limits.Budget
) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of one table (such as `_parameters`) of a module; modules may share a table."""
    for name, value in state[table].items():
        if not isinstance(name, str):
            _refuse(
                path, f"{prefix}{table}[{brief_repr(name)}]", value, "the name of a tensor or module must be a text"
            )
        budget.spend(limits.ENTRY + len(prefix) + len(name))
        yield name, value


def _names_in_set(value: Any, budget: limits.Budget) -> set[str]:
    """Return the names in an inert set, whichever way it was pickled."""
    if not isinstance(value, Opaque):
        return set()
    lists = [arg for arg in value.args[:1] if isinstance(arg, list)] if isinstance(value.args, tuple) else []
    names: set[str] = set()
    for items in (*lists, value.appended):
        budget.spend(_NAME * len(items))
        names.update(name for name in items if isinstance(name, str))
    return names


def _attributes_with_tensors(
    path: Path, found: PickledModule, modules: dict[int, tuple[str, dict[Any, Any]]]
) -> list[str]:
    """Return the attributes of modules that hold tensors which are neither parameters nor buffers."""
    shown = {id(tensor.storage) for tensor in found.tensors.values() if isinstance(tensor, TensorEntry)}
    shown |= {id(tensor) for tensor in found.tensors.values()}
    seen = set(modules)
    names = []
    for prefix, state in modules.values():
        for name, value in state.items():
            if name in _TABLES or not isinstance(name, str):
                continue
            if _holds_other_tensors(path, prefix + name, value, seen, shown):
                names.append(prefix + name)
    return names


def _holds_other_tensors(path: Path, name: str, value: Any, seen: set[int], shown: set[int]) -> bool:
    """Whether an attribute contains tensors other than those in `shown`. Each value in it is visited once."""
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
                _refuse(path, name, item, "it packs its weights in an object that only torch can read")
            stack += (item.args, item.state, *item.appended, *(part for pair in item.items for part in pair))
        elif isinstance(item, dict):
            stack += (*item.keys(), *item.values())
            if isinstance(item, OrderedDict):
                stack.append(item.state)
        elif isinstance(item, list | tuple):
            stack += item
    return found


#: The types of values that contain no other values.
_LEAVES = (str, int, float, bytes, type(None), Global)


def _notes_about(names: list[str]) -> list[str]:
    if not names:
        return []
    holds, its = ("holds", "its module") if len(names) == 1 else ("hold", "their modules")
    return [
        f"{listed(names, 4)} {holds} tensors that are not parameters or buffers of {its}: state_dict() leaves them out"
    ]


def _refuse(path: Path, name: str, value: Any, why: str) -> NoReturn:
    call = value.call if isinstance(value, Opaque) else None
    kind = call.name if isinstance(call, Global) else type(value).__name__
    raise UnsafeError(
        f"{path}: modelcli cannot read {name} ({kind}): {why}, and loading it would run code",
        "load the file with the program that made it, save model.state_dict() there, and use that file",
    )
