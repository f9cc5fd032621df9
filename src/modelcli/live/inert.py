"""Convert the other values in a live model's state dict to the inert values that reading a file gives."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import torch

from modelcli.checkpoints import CompositeEntry, TensorEntry
from modelcli.checkpoints.torch_pickle.composite_tensors import require_call
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef
from modelcli.errors import RequestError
from modelcli.live import composites
from modelcli.live.sources import is_composite
from modelcli.writing import PlannedTensor


def inert_of(name: str, value: Any, planned: Callable[[torch.Tensor], PlannedTensor]) -> Any:
    """Convert an `_extra_state` to inert values.

    Args:
        name: its key, for messages.
        value: the value, which may be nested.
        planned: makes the plan of a plain tensor in it.

    Raises:
        RequestError: it contains an object that `torch.load(weights_only=True)` does not load.
    """

    def inert(item: Any) -> Any:
        return inert_of(name, item, planned)

    if value is None or isinstance(value, str | bytes) or type(value) in (bool, int, float):
        return value
    if isinstance(value, CompositeEntry):
        require_call(name, value)
    if isinstance(value, TensorEntry | CompositeEntry | StorageRef | Opaque | Global | OrderedDict):
        return value  # it comes from a file and is already inert
    if isinstance(value, torch.Tensor):
        return composites.planned(value, planned) if is_composite(value) else planned(value)
    if isinstance(value, torch.dtype):
        return Global("torch", str(value).removeprefix("torch."))
    if type(value) is collections.OrderedDict:
        return OrderedDict((key, inert(item)) for key, item in value.items())
    if type(value) is dict:
        return {key: inert(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(inert(item) for item in value)
    if (how := _MAKERS.get(type(value))) is not None:
        call, args = how
        return Opaque(call, tuple(inert(item) for item in args(value)))
    raise RequestError(f"{name} contains a {type(value).__name__}, which could only be loaded by running code")


#: The class that recreates a value at loading, and the function that gives its arguments.
_MAKERS: Mapping[type, tuple[Global, Callable[[Any], tuple[Any, ...]]]] = {
    set: (Global("builtins", "set"), lambda value: (sorted(value, key=repr),)),
    bytearray: (Global("builtins", "bytearray"), lambda value: (bytes(value),)),
    complex: (Global("builtins", "complex"), lambda value: (value.real, value.imag)),
    collections.Counter: (Global("collections", "Counter"), lambda value: (dict(value),)),
    torch.Size: (Global("torch", "Size"), lambda value: (tuple(value),)),
    torch.device: (Global("torch", "device"), lambda value: value.__reduce__()[1]),
    torch.layout: (Global("torch.serialization", "_get_layout"), lambda value: (str(value),)),
}
