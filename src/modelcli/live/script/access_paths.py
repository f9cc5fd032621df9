"""How a script names a module or tensor of the model, and what puts a module there: `model.classifier[6].weight`.

A class of the user's may have methods of its own where torch's are meant (`__len__`, `append`, `__setattr__`): what
leads through such a method is written in another way.
"""

from __future__ import annotations

from inspect import isfunction

from torch import nn

from modelcli.live.script.source_text import is_name, quoted
from modelcli.live.surgery.core import is_numbered

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: What a container may have of its own: nothing that leads to its children goes through these.
_HARMLESS = ("__init__", "__repr__", "__dir__", "forward")


def place(model: nn.Module, path: str) -> str:
    """The expression for the module at a path."""
    text, holder = "model", model
    for name in path.split(".") if path else ():
        step = _step(holder, name)
        if step is None:
            return f"model.get_submodule({quoted(path)})"
        text, holder = text + step, holder.get_submodule(name)
    return text


def put(model: nn.Module, path: str, new: str) -> str:
    """The statement that puts a module in the place of the one at a path."""
    above, _, name = path.rpartition(".")
    holder = model.get_submodule(above)
    if not can_be_set(model, path):
        return f"{place(model, above)}._modules[{quoted(name)}] = {new}"
    step = _step(holder, name)
    return f"model.set_submodule({quoted(path)}, {new})" if step is None else f"{place(model, above)}{step} = {new}"


def can_be_set(model: nn.Module, path: str) -> bool:
    """Whether `set_submodule` puts a module at a path, and nothing else: it assigns an attribute."""
    return is_of_torch(model.get_submodule(path.rpartition(".")[0]), "__setattr__")


def put_new(model: nn.Module, path: str, new: str) -> str:
    """The statement that gives a module a child of a new name, as its last one."""
    above, _, name = path.rpartition(".")
    holder, at = model.get_submodule(above), place(model, above)
    if isinstance(holder, nn.ModuleDict) and _is_plain(holder):
        return f"{at}[{quoted(name)}] = {new}"
    if isinstance(holder, nn.Sequential | nn.ModuleList) and _is_plain(holder) and name == str(len(holder)):
        return f"{at}.append({new})"
    if name in vars(holder) and is_name(name):  # None until now, which add_module takes for a child
        return f"{at}.{name} = {new}"
    if not is_of_torch(holder, "add_module"):
        return f"{at}._modules[{quoted(name)}] = {new}"
    return f"{at}.add_module({quoted(name)}, {new})"


def insert(model: nn.Module, path: str, new: str) -> list[str]:
    """What puts a module before one of a sequence: the later ones move up."""
    above, _, number = path.rpartition(".")
    at = place(model, above)
    if _is_plain(model.get_submodule(above)):
        return [f"{at}.insert({number}, {new})"]
    return _renumbered(at, f"children.insert({number}, {new})")


def take_out(model: nn.Module, path: str) -> list[str]:
    """What takes the module at a path out; in a sequence the later ones move down."""
    above, _, name = path.rpartition(".")
    holder, at = model.get_submodule(above), place(model, above)
    if is_numbered(holder) and not _is_plain(holder):
        return _renumbered(at, f"del children[{name}]")
    if not is_of_torch(holder, "__delattr__"):
        return [f"del {at}._modules[{quoted(name)}]"]
    step = _step(holder, name)
    return [f"delattr({at}, {quoted(name)})" if step is None else f"del {at}{step}"]


def tensor(model: nn.Module, name: str) -> str:
    """The expression for a parameter or buffer."""
    above, _, own = name.rpartition(".")
    holder = model.get_submodule(above)
    if is_name(own):
        return f"{place(model, above)}.{own}"
    return f"model.get_{'parameter' if own in holder._parameters else 'buffer'}({quoted(name)})"


def is_of_torch(module: nn.Module, *methods: str) -> bool:
    """Whether methods of a module are those that torch gives it, none of a class of the user's own."""
    return all(getattr(getattr(type(module), name), "__module__", "").partition(".")[0] == "torch" for name in methods)


def _is_plain(holder: nn.Module) -> bool:
    """Whether all that leads to the children of a container is torch's."""
    kind = next((kind for kind in _CONTAINERS if isinstance(holder, kind)), None)
    if kind is None:
        return False
    own = [name for name, method in vars(kind).items() if isfunction(method) and name not in _HARMLESS]
    return is_of_torch(holder, *own, "add_module", "__setattr__", "__delattr__")


def _renumbered(at: str, change: str) -> list[str]:
    """A change of the children of a sequence, and their new numbers, where its own methods cannot be asked."""
    return [
        f"children = list({at}._modules.values())",
        change,
        f"{at}._modules = {{str(number): child for number, child in enumerate(children)}}",
    ]


def _step(holder: nn.Module, name: str) -> str | None:
    """What leads from a module to its child: `[6]`, `["left"]`, `.fc`; None where Python has no such spelling."""
    if isinstance(holder, _CONTAINERS) and _is_plain(holder):
        if is_numbered(holder):
            return f"[{name}]"
        if isinstance(holder, nn.ModuleDict):
            return f"[{quoted(name)}]"
    return f".{name}" if is_name(name) and getattr(holder, name, None) is holder._modules[name] else None
