"""Expressions for a model's modules and tensors, such as `model.classifier[6].weight`, and statements that set them.

A user's class may override a method of torch (`__len__`, `append`, `__setattr__`). Then the statements use `_modules`
or `get_submodule` instead of that method.
"""

from __future__ import annotations

from inspect import isfunction

from torch import nn

from modelcli.live.script.source_text import is_name, quoted
from modelcli.live.surgery.core import is_numbered

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: The methods that a subclass of a container may override: access to the children does not use them.
_HARMLESS = ("__init__", "__repr__", "__dir__", "forward")


def module_expression(model: nn.Module, path: str) -> str:
    """Return the expression for the module at a path: `model.classifier[6]`."""
    text, holder = "model", model
    for name in path.split(".") if path else ():
        accessor = _child_accessor(holder, name)
        if accessor is None:
            return f"model.get_submodule({quoted(path)})"
        text, holder = text + accessor, holder.get_submodule(name)
    return text


def replace_statement(model: nn.Module, path: str, new: str) -> str:
    """Return the statement that replaces the module at a path by the module of the expression `new`."""
    above, _, name = path.rpartition(".")
    holder = model.get_submodule(above)
    if not is_plain_assignment(model, path):
        return f"{module_expression(model, above)}._modules[{quoted(name)}] = {new}"
    accessor = _child_accessor(holder, name)
    return (
        f"model.set_submodule({quoted(path)}, {new})"
        if accessor is None
        else f"{module_expression(model, above)}{accessor} = {new}"
    )


def is_plain_assignment(model: nn.Module, path: str) -> bool:
    """Whether assigning the attribute of a path only sets the module there: no class overrides `__setattr__`."""
    return uses_torch_methods(model.get_submodule(path.rpartition(".")[0]), "__setattr__")


def add_statement(model: nn.Module, path: str, new: str) -> str:
    """Return the statement that adds the module of the expression `new` at a path, as the last child of its parent."""
    above, _, name = path.rpartition(".")
    holder, at = model.get_submodule(above), module_expression(model, above)
    if isinstance(holder, nn.ModuleDict) and _has_torch_child_methods(holder):
        return f"{at}[{quoted(name)}] = {new}"
    if (
        isinstance(holder, nn.Sequential | nn.ModuleList)
        and _has_torch_child_methods(holder)
        and name == str(len(holder))
    ):
        return f"{at}.append({new})"
    if name in vars(holder) and is_name(name):  # the attribute is None, and add_module raises if it exists
        return f"{at}.{name} = {new}"
    if not uses_torch_methods(holder, "add_module"):
        return f"{at}._modules[{quoted(name)}] = {new}"
    return f"{at}.add_module({quoted(name)}, {new})"


def insert_statements(model: nn.Module, path: str, new: str) -> list[str]:
    """Return the statements that insert a module into a sequence before the child at a path; later children move up."""
    above, _, number = path.rpartition(".")
    at = module_expression(model, above)
    if _has_torch_child_methods(model.get_submodule(above)):
        return [f"{at}.insert({number}, {new})"]
    return _change_children(at, f"children.insert({number}, {new})")


def remove_statements(model: nn.Module, path: str) -> list[str]:
    """Return the statements that remove the module at a path; in a sequence, later children move down."""
    above, _, name = path.rpartition(".")
    holder, at = model.get_submodule(above), module_expression(model, above)
    if is_numbered(holder) and not _has_torch_child_methods(holder):
        return _change_children(at, f"del children[{name}]")
    if not uses_torch_methods(holder, "__delattr__"):
        return [f"del {at}._modules[{quoted(name)}]"]
    accessor = _child_accessor(holder, name)
    return [f"delattr({at}, {quoted(name)})" if accessor is None else f"del {at}{accessor}"]


def tensor_expression(model: nn.Module, name: str) -> str:
    """Return the expression for a parameter or buffer."""
    above, _, own = name.rpartition(".")
    holder = model.get_submodule(above)
    if is_name(own):
        return f"{module_expression(model, above)}.{own}"
    return f"model.get_{'parameter' if own in holder._parameters else 'buffer'}({quoted(name)})"


def uses_torch_methods(module: nn.Module, *methods: str) -> bool:
    """Whether torch defines these methods of a module, so that no user's class overrides one."""
    return all(getattr(getattr(type(module), name), "__module__", "").partition(".")[0] == "torch" for name in methods)


def _has_torch_child_methods(holder: nn.Module) -> bool:
    """Whether a module is a container of torch, and no user's class overrides a method that accesses its children."""
    kind = next((kind for kind in _CONTAINERS if isinstance(holder, kind)), None)
    if kind is None:
        return False
    own = [name for name, method in vars(kind).items() if isfunction(method) and name not in _HARMLESS]
    return uses_torch_methods(holder, *own, "add_module", "__setattr__", "__delattr__")


def _change_children(at: str, change: str) -> list[str]:
    """Return statements that change the children of a sequence and renumber them, without the sequence's methods.

    Args:
        at: the expression for the sequence.
        change: the statement that changes the list `children`.
    """
    return [
        f"children = list({at}._modules.values())",
        change,
        f"{at}._modules = {{str(number): child for number, child in enumerate(children)}}",
    ]


def _child_accessor(holder: nn.Module, name: str) -> str | None:
    """Return the suffix for a child of a module: `[6]`, `["left"]`, `.fc`; None if Python has no such syntax for it."""
    if isinstance(holder, _CONTAINERS) and _has_torch_child_methods(holder):
        if is_numbered(holder):
            return f"[{name}]"
        if isinstance(holder, nn.ModuleDict):
            return f"[{quoted(name)}]"
    return f".{name}" if is_name(name) and getattr(holder, name, None) is holder._modules[name] else None
