"""Recover the arguments of a module's constructor from the module's attributes."""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, Literal

import torch
from torch import nn

from modelcli.live import modules
from modelcli.live.sources import is_lazy


class _Unknown(Enum):
    """The type of UNKNOWN, a value that is not known. (None is a possible value of an argument.)"""

    UNKNOWN = "unknown"

    def __bool__(self) -> Literal[False]:
        return False


UNKNOWN: Final = _Unknown.UNKNOWN
Unknown = Literal[_Unknown.UNKNOWN]


def setting(module: nn.Module, name: str) -> Any | Unknown:
    """Return the value that a constructor argument had, according to the module's attributes.

    Args:
        module: the module.
        name: the name of the argument; PyTorch's modules usually store it in an attribute of the same name.

    Returns:
        A plain value (None is one), or UNKNOWN if no attribute has it.
    """
    if name in ("device", "dtype"):
        return UNKNOWN
    if name == "bias":
        return _has_bias(module)
    if name == "add_bias_kv" and isinstance(module, nn.MultiheadAttention):
        return module.bias_k is not None
    try:
        value = getattr(module, name, UNKNOWN)
    except Exception:  # it may be a property that raises anything
        return UNKNOWN
    if value is None:
        return None if name in modules.parameter_names(type(module)) else UNKNOWN
    if type(value) is int and value == 0 and any(map(is_lazy, module.parameters())):
        return UNKNOWN  # a lazy module does not know its sizes yet
    if isinstance(value, torch.Size):
        return tuple(value)
    return value if isinstance(value, bool | int | float | str | tuple | list) else UNKNOWN


def _has_bias(module: nn.Module) -> bool | Unknown:
    """Whether a module adds a bias, according to its parameters or to the flag of recurrent layers."""
    if "bias" in module._parameters:
        return module._parameters["bias"] is not None
    if isinstance(flag := getattr(module, "bias", None), bool):
        return flag
    # `in_proj_bias` of an attention; `bias_k` and `bias_v` are extra keys and values
    biases = [tensor for name, tensor in module._parameters.items() if name.endswith("_bias")]
    return any(tensor is not None for tensor in biases) if biases else UNKNOWN
