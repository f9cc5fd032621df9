"""What the attributes of a module tell of the arguments that its constructor was called with."""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, Literal

import torch
from torch import nn

from modelcli.live import modules
from modelcli.live.sources import is_lazy


class _Unknown(Enum):
    """The type of a value that is not known: None is a value that an argument may have."""

    UNKNOWN = "unknown"

    def __bool__(self) -> Literal[False]:
        return False


UNKNOWN: Final = _Unknown.UNKNOWN
Unknown = Literal[_Unknown.UNKNOWN]


def setting(module: nn.Module, name: str) -> Any | Unknown:
    """The value that a constructor argument had, as the module's attributes tell it.

    Args:
        module: the module.
        name: the argument's name, which PyTorch's modules give to the attribute that keeps it, as a rule.

    Returns:
        A plain value (None is one), or UNKNOWN where no attribute tells.
    """
    if name in ("device", "dtype"):
        return UNKNOWN
    if name == "bias":
        return _has_bias(module)
    if name == "add_bias_kv" and isinstance(module, nn.MultiheadAttention):
        return module.bias_k is not None
    try:
        value = getattr(module, name, UNKNOWN)
    except Exception:  # a property of somebody's class
        return UNKNOWN
    if value is None:
        return None if name in modules.parameter_names(type(module)) else UNKNOWN
    if type(value) is int and value == 0 and any(map(is_lazy, module.parameters())):
        return UNKNOWN  # a lazy module does not know its sizes yet
    if isinstance(value, torch.Size):
        return tuple(value)
    return value if isinstance(value, bool | int | float | str | tuple | list) else UNKNOWN


def _has_bias(module: nn.Module) -> bool | Unknown:
    """Whether a module adds a bias: its tables tell, or the flag that recurrent layers keep."""
    if "bias" in module._parameters:
        return module._parameters["bias"] is not None
    if isinstance(flag := getattr(module, "bias", None), bool):
        return flag
    # `in_proj_bias` of an attention; `bias_k` and `bias_v` are extra keys and values
    biases = [tensor for name, tensor in module._parameters.items() if name.endswith("_bias")]
    return any(tensor is not None for tensor in biases) if biases else UNKNOWN
