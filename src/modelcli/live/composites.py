"""Convert quantized and sparse tensors, which are not plain views of one storage, between files and torch.

The meta device does not support quantized tensors, so such tensors are real everywhere; those of a file are mapped.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modelcli.checkpoints import CompositeEntry, TensorEntry
from modelcli.checkpoints.limits import Budget
from modelcli.checkpoints.torch_pickle.composite_tensors import entry_of, quantized_bytes, require_call
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef
from modelcli.errors import FileFormatError
from modelcli.live.sources import Value, dtype_of, real_storage
from modelcli.writing import PlannedStorage, PlannedTensor


def components(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the plain tensors in a sparse tensor: its indices, then its values."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a quantized tensor (integers and scales) or a sparse one (indices and values)."""
    if not tensor.is_quantized:
        return sum(part.nbytes for part in components(tensor))
    scales = (part.nbytes for part in _quantizer(tensor) if isinstance(part, torch.Tensor))
    return quantized_bytes(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) + sum(scales)


def _quantizer(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.qscheme() == torch.per_tensor_affine:
        return tensor.q_scale(), tensor.q_zero_point()
    return tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()


# --- from a file ---------------------------------------------------------------------------------------------------


def real(name: str, entry: CompositeEntry) -> torch.Tensor:
    """Return the tensor that `torch.load` makes from an entry, with its bytes mapped.

    Raises FileFormatError if torch refuses it, because indices are outside its shape or scales do not fit it.
    """
    require_call(name, entry)
    if entry.is_parameter:
        data = real(name, replace(entry, made_by=entry.made_by.args[0], is_parameter=False))
        return nn.Parameter(data, requires_grad=bool(entry.requires_grad))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are deprecated, and sparse ones in beta
            return _MAKERS[entry.made_by.call.name](entry, entry.made_by.args)
    except (RuntimeError, ValueError, TypeError) as error:
        raise FileFormatError(f"{name} is damaged: {' '.join(str(error).split())}") from None


def _plain(entry: TensorEntry) -> torch.Tensor:
    made = torch.empty(0, dtype=dtype_of(entry.dtype))
    return made.set_(real_storage(entry.storage), entry.offset, entry.shape, entry.stride)


def _quantized(entry: CompositeEntry, args: tuple[Any, ...]) -> torch.Tensor:
    storage, offset, _shape, stride, (scheme, *quantizer), *_ = args
    untyped = real_storage(storage.span)
    if entry.dtype in ("quint4x2", "quint2x4"):
        untyped = untyped.clone()  # torch enlarges it to one byte per element
    typed = torch.TypedStorage(wrap_storage=untyped, dtype=dtype_of(entry.dtype), _internal=True)
    parts = tuple(_plain(part) if isinstance(part, TensorEntry) else part for part in quantizer)
    made: torch.Tensor = torch._utils._rebuild_qtensor(
        typed, offset, entry.shape, stride, (getattr(torch, scheme.name), *parts), False, collections.OrderedDict()
    )
    return made


def _sparse(entry: CompositeEntry, args: tuple[Any, ...]) -> torch.Tensor:
    if entry.layout == "sparse_coo":
        indices, values = map(_plain, entry.parts)
        _layout, (_indices, _values, _size, *coalesced) = args
        is_coalesced = coalesced[0] if coalesced else None
        return torch.sparse_coo_tensor(indices, values, entry.shape, is_coalesced=is_coalesced, check_invariants=True)
    compressed, plain, values = map(_plain, entry.parts)
    layout = getattr(torch, entry.layout)
    return torch.sparse_compressed_tensor(compressed, plain, values, entry.shape, layout=layout, check_invariants=True)


def _on_meta(entry: CompositeEntry, _args: tuple[Any, ...]) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=dtype_of(entry.dtype), device="meta")


_MAKERS: dict[str, Callable[[CompositeEntry, tuple[Any, ...]], torch.Tensor]] = {
    "_rebuild_qtensor": _quantized,
    "_rebuild_sparse_tensor": _sparse,
    "_rebuild_meta_tensor_no_storage": _on_meta,
}


# --- to a file -----------------------------------------------------------------------------------------------------


def planned(tensor: torch.Tensor, plan: Callable[[torch.Tensor], PlannedTensor]) -> CompositeEntry:
    """Return the entry that `torch.save` writes for a quantized or sparse tensor. `plan` plans each plain part."""
    dtype, layout = (str(what).removeprefix("torch.") for what in (tensor.dtype, tensor.layout))
    made_by = _quantized_call(tensor, dtype, plan) if tensor.is_quantized else _sparse_call(tensor, plan)
    return CompositeEntry(tuple(tensor.shape), dtype, layout, (), stored_bytes(tensor), made_by)


def _quantized_call(tensor: torch.Tensor, dtype: str, plan: Callable[[torch.Tensor], PlannedTensor]) -> Opaque:
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    scheme = "per_tensor_affine" if tensor.qscheme() == torch.per_tensor_affine else "per_channel_affine"
    quantizer = (plan(part) if isinstance(part, torch.Tensor) else part for part in _quantizer(tensor))
    args = (
        PlannedStorage(dtype, plan(whole).source),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        (Global("torch", scheme), *quantizer),
        False,
        OrderedDict(),
    )
    return Opaque(Global("torch._utils", "_rebuild_qtensor"), args)


def _sparse_call(tensor: torch.Tensor, plan: Callable[[torch.Tensor], PlannedTensor]) -> Opaque:
    layout = Opaque(Global("torch.serialization", "_get_layout"), (str(tensor.layout),))
    size = Opaque(Global("torch", "Size"), (tuple(tensor.shape),))
    more = (tensor.is_coalesced(),) if tensor.layout == torch.sparse_coo else ()
    data = (*map(plan, components(tensor)), size, *more)
    return Opaque(Global("torch._utils", "_rebuild_sparse_tensor"), (layout, data))


# --- in memory -----------------------------------------------------------------------------------------------------


def held(name: str, tensor: torch.Tensor) -> CompositeEntry | None:
    """Return the entry that a file would have for a quantized or sparse tensor; None for one on the meta device."""
    if tensor.is_meta:
        return None
    call = planned(tensor, planned_here).made_by
    return entry_of(Opaque(call.call, as_read(call.args)), name, Budget(name, 0))


def planned_here(part: torch.Tensor) -> PlannedTensor:
    return PlannedTensor(
        shape=tuple(part.shape),
        dtype=str(part.dtype).removeprefix("torch."),
        stride=tuple(part.stride()),
        offset=int(part.storage_offset()),
        source=Value(part.untyped_storage()),
    )


def as_read(value: Any) -> Any:
    """Convert a planned value in memory to the value that reading the written file would give."""
    match value:
        case PlannedStorage(dtype=dtype, source=Value() as source):
            return StorageRef(source, dtype, source.nbytes)
        case PlannedTensor(source=Value() as source):
            return TensorEntry(value.shape, value.dtype, value.stride, value.offset, source)
        case CompositeEntry(parts=()) if isinstance(value.made_by, Opaque):
            return as_read(value.made_by)  # a planned entry, whose parts are in its call
        case Opaque():
            return Opaque(value.call, as_read(value.args), value.state, value.items, value.appended, value.how)
        case OrderedDict():
            return OrderedDict((key, as_read(item)) for key, item in value.items())
        case dict():
            return {key: as_read(item) for key, item in value.items()}
        case tuple() | list():
            return type(value)(map(as_read, value))
    return value
