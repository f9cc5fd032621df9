"""What a live model's state dict holds besides plain tensors, as the inert values that a file would have."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import torch

from modelcli.checkpoints import CompositeEntry, TensorEntry
from modelcli.checkpoints.torch_pickle.composite_tensors import require_call
from modelcli.checkpoints.torch_pickle.pickles import Global, Opaque, OrderedDict, StorageRef
from modelcli.errors import RequestError
from modelcli.live import composites
from modelcli.live.sources import is_composite
from modelcli.writing import PlannedTensor


def inert_of(name: str, value: Any, planned: Callable[[torch.Tensor], PlannedTensor]) -> Any:
    """An `_extra_state`, where it is made of what `torch.load(weights_only=True)` takes."""

    def inert(item: Any) -> Any:
        return inert_of(name, item, planned)

    if value is None or isinstance(value, str | bytes) or type(value) in (bool, int, float):
        return value
    if isinstance(value, CompositeEntry):
        require_call(name, value)
    if isinstance(value, TensorEntry | CompositeEntry | StorageRef | Opaque | Global | OrderedDict):
        return value  # from a file, and as inert as it was
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
    raise RequestError(
        f"{name} holds a {type(value).__name__}, which cannot be written without running code to load it"
    )


#: The class that makes a value again when it is loaded, and from what.
_MAKERS: Mapping[type, tuple[Global, Callable[[Any], tuple[Any, ...]]]] = {
    set: (Global("builtins", "set"), lambda value: (sorted(value, key=repr),)),
    bytearray: (Global("builtins", "bytearray"), lambda value: (bytes(value),)),
    complex: (Global("builtins", "complex"), lambda value: (value.real, value.imag)),
    collections.Counter: (Global("collections", "Counter"), lambda value: (dict(value),)),
    torch.Size: (Global("torch", "Size"), lambda value: (tuple(value),)),
    torch.device: (Global("torch", "device"), lambda value: value.__reduce__()[1]),
    torch.layout: (Global("torch.serialization", "_get_layout"), lambda value: (str(value),)),
}
