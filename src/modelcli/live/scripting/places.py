"""How a script names a module or tensor of the model: `model.classifier[6].weight`."""

from __future__ import annotations

from torch import nn

from modelcli.live.scripting.page import is_name, quoted
from modelcli.live.surgery.core import is_numbered

_INDEXED = (nn.Sequential.__getitem__, nn.ModuleList.__getitem__)


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
    step = _step(model.get_submodule(above), name)
    return f"model.set_submodule({quoted(path)}, {new})" if step is None else f"{place(model, above)}{step} = {new}"


def take_out(model: nn.Module, path: str) -> str:
    """The statement that takes the module at a path out; in a sequence the later ones move down."""
    above, _, name = path.rpartition(".")
    step = _step(model.get_submodule(above), name)
    return f"delattr({place(model, above)}, {quoted(name)})" if step is None else f"del {place(model, above)}{step}"


def tensor(model: nn.Module, name: str) -> str:
    """The expression for a parameter or buffer."""
    above, _, own = name.rpartition(".")
    holder = model.get_submodule(above)
    if is_name(own):
        return f"{place(model, above)}.{own}"
    return f"model.get_{'parameter' if own in holder._parameters else 'buffer'}({quoted(name)})"


def _step(holder: nn.Module, name: str) -> str | None:
    """What leads from a module to its child: `[6]`, `["left"]`, `.fc`; None where Python has no such spelling."""
    if is_numbered(holder) and getattr(type(holder), "__getitem__", None) in _INDEXED:
        return f"[{name}]"
    if isinstance(holder, nn.ModuleDict) and type(holder).__getitem__ is nn.ModuleDict.__getitem__:
        return f"[{quoted(name)}]"
    return f".{name}" if is_name(name) and getattr(holder, name, None) is holder._modules[name] else None
