"""Module expressions that make a layer of `torch.nn` again with another size, and keep its other settings by `_`."""

from __future__ import annotations

from torch import nn

from modelcli.language.expressions import HOLE, Call
from modelcli.live import modules, signatures
from modelcli.live.surgery.settings import UNKNOWN, setting

#: The classes that can be made again, with the leading arguments that decide their shapes.
_LEADING: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: ("in_channels", "out_channels", "kernel_size"),
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size"),
    nn.Conv3d: ("in_channels", "out_channels", "kernel_size"),
}
#: The arguments for the number of inputs and of outputs of each.
INPUTS, OUTPUTS = ("in_features", "in_channels"), ("out_features", "out_channels")


def layer_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of `torch.nn` that a layer is made of again; None for layers of other kinds."""
    return next((kind for kind in _LEADING if isinstance(module, kind)), None)


def size(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the number of inputs or outputs of a layer; None for layers of other kinds."""
    kind = layer_class(module)
    return next((getattr(module, name) for name in names if kind and name in _LEADING[kind]), None)


def with_size(module: nn.Module, names: tuple[str, ...], value: int) -> Call:
    """Return the expression for a layer with another number of inputs or outputs: `Conv2d(1,_,_,stride=_,bias=_)`.

    Settings that differ from their defaults are written as `_`; what is not written has its default.
    """
    kind = layer_class(module)
    assert kind is not None
    leading = _LEADING[kind]
    args = tuple(value if name in names else HOLE for name in leading)
    defaults = {p.name: p.default for p in signatures.of(kind).parameters.values()}
    kept = [name for name in modules.parameter_names(kind) if name not in leading and _differs(module, name, defaults)]
    return Call(kind.__name__, args, dict.fromkeys(kept, HOLE))


def _differs(module: nn.Module, name: str, defaults: dict[str, object]) -> bool:
    """Whether a setting of a module is known and not the default; 1 equals (1, 1)."""
    value = setting(module, name)
    default = defaults[name]
    if value is UNKNOWN:
        return False
    if isinstance(value, tuple) and not isinstance(default, tuple):
        return any(each != default for each in value)
    return bool(value != default)
