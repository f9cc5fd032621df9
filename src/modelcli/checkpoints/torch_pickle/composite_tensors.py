"""Tensors that are no view into one storage: quantized, sparse, on the meta device, or of a subclass.

They are recognised by the function of `torch._utils` that rebuilds them, which `torch.Tensor.__reduce_ex__` writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

from modelcli.checkpoints import limits, shapes
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.torch_pickle.allow_list import HARMLESS, PARAMETER
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef, sizes_in
from modelcli.errors import FileFormatError, RequestError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Shape

_CALLS = frozenset(
    {
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_meta_tensor_no_storage",
    }
)
#: What makes a tensor of a class that wraps others, as torchao's, from `_WRAPPER`, the class, arguments and state.
_OF_CLASS = Global("torch._tensor", "_rebuild_from_type_v2")
_WRAPPER = Global("torch._utils", "_rebuild_wrapper_subclass")
#: Of this class one rank has a part of the elements alone.
_SHARDED = "DTensor"
_PARAMETERS = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})
#: What other libraries' objects in a state dict are known to be, where they are no tensors.
_NEVER_TENSORS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "pathlib.", "datetime.", "enum.")
_ELEMENTS_PER_BYTE = {"quint4x2": 2, "quint2x4": 4}


def is_tensor(value: Any) -> bool:
    """Whether an inert value is a tensor: a view into a storage, or what such a call makes."""
    return isinstance(value, TensorEntry) or makes_tensor(value)


def makes_tensor(value: Any) -> bool:
    """Whether an inert value is a call that makes such a tensor, or a `Parameter` around one."""
    if not isinstance(value, Opaque) or not isinstance(value.call, Global):
        return False
    if value.call.dotted in _PARAMETERS:
        return isinstance(value.args, tuple) and bool(value.args) and _is_call(value.args[0])
    return _is_call(value)


def _is_call(value: Any) -> bool:
    if not isinstance(value, Opaque) or not isinstance(value.call, Global):
        return False
    return value.call.dotted in _CALLS or _is_wrapper(value)


def _is_wrapper(value: Opaque) -> bool:
    """Whether a call makes a tensor of a class of its own, whose values are in other tensors."""
    match value.call, value.args:
        case call, (made_by, Global() as kind, tuple(), _) if (call, made_by) == (_OF_CLASS, _WRAPPER):
            return kind.name != _SHARDED
    return False


def class_of(entry: CompositeEntry) -> str | None:
    """The name of the class of a tensor that wraps others, which only its own code makes again; None of any other."""
    made_by = without_parameter(entry.made_by)
    return made_by.args[1].dotted if isinstance(made_by, Opaque) and _is_wrapper(made_by) else None


def require_call(name: str, entry: CompositeEntry) -> None:
    """Raise RequestError for a tensor that torch has no type for."""
    if entry.made_by is None:
        raise RequestError(f"{name} is {entry.dtype}, which torch has no type for: it can be looked at, and no more")
    if (kind := class_of(entry)) is not None:
        raise RequestError(f"{name} is a {kind}, which only its own code makes: it can be looked at, and no more")


def without_parameter(made_by: Any) -> Any:
    """The call that makes a tensor, less those around it that make it a parameter."""
    while isinstance(made_by, Opaque) and isinstance(made_by.call, Global) and made_by.call.dotted in _PARAMETERS:
        made_by = made_by.args[0]
    return made_by


def may_be_tensor(value: Any) -> bool:
    """Whether torch makes a tensor of an inert value, or only running its code could tell that it makes none."""
    if not isinstance(value, Opaque):
        return isinstance(value, StorageRef)
    if not isinstance(value.call, Global):
        return True
    name = value.call.dotted
    if name in HARMLESS:
        return "Tensor" in name or "_rebuild" in name or "Storage" in name or name == PARAMETER
    return not name.startswith(_NEVER_TENSORS)


def entry_of(value: Opaque, where: str, budget: limits.Budget) -> CompositeEntry:
    """The tensor that a call makes; `where` names it, and `budget` is that of its file.

    What is kept of the call is what the tensor needs: where hooks and attributes stand could be anything. Raises
    FileFormatError where its arguments are not those of a tensor, or need more bytes than there are.
    """
    try:
        return _entry(value, where, budget)
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{where} is damaged: {error}") from None


def _entry(value: Opaque, where: str, budget: limits.Budget) -> CompositeEntry:
    if _is_wrapper(value):
        return _wrapped(value, where, budget)
    match value.call.name, value.args:
        case "_rebuild_qtensor", (StorageRef(offset=0) as storage, int() as offset, shape, stride, quantizer, grad, *_):
            view = shapes.shape(sizes_in(shape), where), shapes.sizes(sizes_in(stride), where)
            return _quantized(storage, offset, *view, _quantizer(quantizer, budget), bool(grad))
        case "_rebuild_sparse_tensor", (
            Opaque(call=Global(name="_get_layout"), args=(str() as layout,)),
            tuple() as data,
        ):
            return _sparse(layout.removeprefix("torch."), data, where)
        case "_rebuild_meta_tensor_no_storage", (Global(module="torch", name=dtype), shape, stride, grad):
            if dtype not in ITEM_BYTES:
                raise ValueError(f"a tensor of dtype {dtype}")
            size, step = shapes.shape(sizes_in(shape), where), shapes.sizes(sizes_in(stride), where)
            made_by = _call("_rebuild_meta_tensor_no_storage", Global("torch", dtype), size, step, bool(grad))
            return CompositeEntry(size, dtype, "strided", (), 0, made_by)
        case (("_rebuild_parameter" | "_rebuild_parameter_with_state"), (Opaque() as inner, grad, *_)):
            plain = _entry(inner, where, budget)
            made_by = _call("_rebuild_parameter", plain.made_by, bool(grad), OrderedDict())
            return replace(plain, made_by=made_by, requires_grad=bool(grad), is_parameter=True)
    raise ValueError(f"{value.call.dotted} with arguments that make no tensor")


def _call(name: str, *args: Any) -> Opaque:
    return Opaque(Global("torch._utils", name), args)


def _quantized(
    storage: StorageRef, offset: int, shape: Shape, stride: Shape, quantizer: tuple[Any, ...], grad: bool
) -> CompositeEntry:
    dtype = storage.dtype
    if dtype is None or not dtype.startswith("q") or offset < 0:
        raise ValueError(f"a quantized tensor of dtype {dtype}, shape {shape}, stride {stride}")
    data = TensorEntry(shape, dtype, stride, offset, storage.span)
    last = shapes.extent(shape, stride)
    needed = (offset + last) * ITEM_BYTES[dtype] if last else 0
    if (sharing := _ELEMENTS_PER_BYTE.get(dtype)) is not None:
        # Strides say nothing of where such elements are: the bytes themselves are shown.
        nbytes = quantized_bytes(dtype, shape)
        data = TensorEntry((nbytes,), "uint8", (1,), offset // sharing, storage.span)
        needed = data.offset + nbytes
    if needed > storage.span.nbytes:
        raise ValueError(f"shape {list(shape)} needs {needed:,} bytes, and its record holds {storage.span.nbytes:,}")
    parts = (data, *(part for part in quantizer if isinstance(part, TensorEntry)))
    made_by = _call("_rebuild_qtensor", storage, offset, shape, stride, quantizer, grad, OrderedDict())
    return CompositeEntry(shape, dtype, "strided", parts, _bytes_of(parts), made_by)


def _quantizer(value: Any, budget: limits.Budget) -> tuple[Any, ...]:
    """The scheme and its numbers: a scale and a zero point, or those of each channel and the axis of the channels."""
    match value:
        case Global(module="torch", name="per_tensor_affine") as scheme, int() | float() as scale, int() as zero_point:
            return scheme, scale, zero_point
        case (
            Global(module="torch", name="per_channel_affine" | "per_channel_affine_float_qparams") as scheme,
            TensorEntry() | list() as scales,
            TensorEntry() | list() as zero_points,
            int() as axis,
        ) if _are_numbers(scales, budget) and _are_numbers(zero_points, budget):
            return scheme, scales, zero_points, axis
    raise ValueError("a quantized tensor without a scale")


def _are_numbers(values: TensorEntry | list[Any], budget: limits.Budget) -> bool:
    if isinstance(values, TensorEntry):
        return True
    budget.spend(len(values))
    return all(isinstance(value, int | float) for value in values)


def quantized_bytes(dtype: str, shape: Shape) -> int:
    """What the elements of a quantized tensor take. Those of `quint4x2` share a byte, and each row starts a new one."""
    *outer, row = shape or (1,)
    return prod(outer) * -(-row * ITEM_BYTES[dtype] // _ELEMENTS_PER_BYTE.get(dtype, 1))


def _sparse(layout: str, data: tuple[Any, ...], where: str) -> CompositeEntry:
    parts: tuple[TensorEntry, ...]
    match layout, data:
        case "sparse_coo", (TensorEntry() as indices, TensorEntry() as values, size, *more) if more in (
            [],
            [True],
            [False],
        ):
            parts = (indices, values)
        case (
            ("sparse_csr" | "sparse_csc" | "sparse_bsr" | "sparse_bsc"),
            (TensorEntry() as compressed, TensorEntry() as plain, TensorEntry() as values, size),
        ):
            parts, more = (compressed, plain, values), []
        case _:
            raise ValueError(f"a sparse tensor of layout {layout!r} that is not made of indices and values")
    shape = shapes.shape(sizes_in(size), where)
    made_by = _call(
        "_rebuild_sparse_tensor",
        Opaque(Global("torch.serialization", "_get_layout"), (f"torch.{layout}",)),
        (*parts, Opaque(Global("torch", "Size"), (shape,)), *more),
    )
    return CompositeEntry(shape, values.dtype, layout, parts, _bytes_of(parts), made_by)


def _wrapped(value: Opaque, where: str, budget: limits.Budget) -> CompositeEntry:
    """A tensor of a class that wraps others: it says of itself which shape and dtype it has."""
    _, kind, args, state = value.args
    match args:
        case (Global(), Global(module="torch", name=dtype), size, *_) if dtype in ITEM_BYTES:
            shape = shapes.shape(sizes_in(size), where)
        case _:
            raise ValueError(f"a {kind.dotted} that does not say its shape and dtype")
    parts = tuple(_parts_in(state, where, budget))
    if not parts:
        raise ValueError(f"a {kind.dotted} that holds no tensor")
    grad = args[-1] if isinstance(args[-1], bool) else None
    return CompositeEntry(shape, dtype, kind.name, parts, _bytes_of(parts), value, requires_grad=grad)


def _parts_in(state: Any, where: str, budget: limits.Budget) -> Iterator[TensorEntry]:
    """The plain tensors in the attributes of a tensor, in their order; some may lie in tensors that lie in it."""
    seen: set[int] = set()
    stack = [state]
    while stack:
        item = stack.pop()
        budget.spend(limits.ENTRY)
        if isinstance(item, TensorEntry):
            yield item
        elif makes_tensor(item) and not _is_wrapper(without_parameter(item)):
            yield from _entry(item, where, budget).parts
        elif isinstance(item, dict | list | tuple | Opaque) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, Opaque):
                stack += [item.state, item.args]
            else:
                stack += reversed([*(item.values() if isinstance(item, dict) else item)])


def _bytes_of(parts: tuple[TensorEntry, ...]) -> int:
    return sum(prod(part.shape) * ITEM_BYTES[part.dtype] for part in parts)
