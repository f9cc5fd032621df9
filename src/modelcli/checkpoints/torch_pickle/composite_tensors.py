"""Tensors that are not a view of one storage: quantized, sparse, on the meta device, or of a subclass.

A file has them as a call of the function of `torch._utils` that `torch.Tensor.__reduce_ex__` writes for them.
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
#: Makes a tensor subclass that wraps other tensors (torchao) from `_WRAPPER`, class, arguments, state.
_OF_CLASS = Global("torch._tensor", "_rebuild_from_type_v2")
_WRAPPER = Global("torch._utils", "_rebuild_wrapper_subclass")
#: The class of tensors of which each process has only a part.
_SHARDED = "DTensor"
_PARAMETERS = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})
#: The names of other libraries' objects that can be in a state dict and are certainly not tensors.
_NEVER_TENSORS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "pathlib.", "datetime.", "enum.")
_ELEMENTS_PER_BYTE = {"quint4x2": 2, "quint2x4": 4}


def is_tensor(value: Any) -> bool:
    """Whether an inert value is a tensor: a view of a storage, or a composite one."""
    return isinstance(value, TensorEntry) or makes_tensor(value)


def makes_tensor(value: Any) -> bool:
    """Whether an inert value is a call that makes a composite tensor, or a `Parameter` of one."""
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
    """Whether a call makes a tensor subclass whose values are in other tensors."""
    match value.call, value.args:
        case call, (made_by, Global() as kind, tuple(), _) if (call, made_by) == (_OF_CLASS, _WRAPPER):
            return kind.name != _SHARDED
    return False


def class_of(entry: CompositeEntry) -> str | None:
    """Return the class name of a tensor subclass that wraps other tensors; None for any other tensor."""
    made_by = without_parameter(entry.made_by)
    return made_by.args[1].dotted if isinstance(made_by, Opaque) and _is_wrapper(made_by) else None


def require_call(name: str, entry: CompositeEntry) -> None:
    """Raise RequestError for a tensor that torch cannot make without code of another library."""
    if entry.made_by is None:
        raise RequestError(f"{name} has the dtype {entry.dtype}, which torch does not have: modelcli can only show it")
    if (kind := class_of(entry)) is not None:
        raise RequestError(f"{name} is a {kind}, which only the code of its class can make: modelcli can only show it")


def without_parameter(made_by: Any) -> Any:
    """Return the call that makes a tensor, without the calls that make a parameter of it."""
    while isinstance(made_by, Opaque) and isinstance(made_by.call, Global) and made_by.call.dotted in _PARAMETERS:
        made_by = made_by.args[0]
    return made_by


def may_be_tensor(value: Any) -> bool:
    """Whether an inert value is a tensor when it is loaded, or could be one (an object of an unknown class)."""
    if not isinstance(value, Opaque):
        return isinstance(value, StorageRef)
    if not isinstance(value.call, Global):
        return True
    name = value.call.dotted
    if name in HARMLESS:
        return "Tensor" in name or "_rebuild" in name or "Storage" in name or name == PARAMETER
    return not name.startswith(_NEVER_TENSORS)


def entry_of(value: Opaque, where: str, budget: limits.Budget) -> CompositeEntry:
    """Return the composite tensor that a call makes.

    Hooks and attributes in the call are left out, because they could be anything.

    Args:
        value: the call.
        where: the name of the tensor in error messages.
        budget: what its file may still describe.

    Raises:
        FileFormatError: the arguments are not those of a tensor, or need more bytes than the file has.
    """
    try:
        return _entry(value, where, budget)
    except (ValueError, TypeError) as error:
        raise FileFormatError.damaged(where, str(error)) from None


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
                raise ValueError(f"torch has no dtype {dtype}")
            size, step = shapes.shape(sizes_in(shape), where), shapes.sizes(sizes_in(stride), where)
            made_by = _call("_rebuild_meta_tensor_no_storage", Global("torch", dtype), size, step, bool(grad))
            return CompositeEntry(size, dtype, "strided", (), 0, made_by)
        case (("_rebuild_parameter" | "_rebuild_parameter_with_state"), (Opaque() as inner, grad, *_)):
            plain = _entry(inner, where, budget)
            made_by = _call("_rebuild_parameter", plain.made_by, bool(grad), OrderedDict())
            return replace(plain, made_by=made_by, requires_grad=bool(grad), is_parameter=True)
    raise ValueError(f"the arguments of {value.call.dotted} are not those of a tensor")


def _call(name: str, *args: Any) -> Opaque:
    return Opaque(Global("torch._utils", name), args)


def _quantized(
    storage: StorageRef, offset: int, shape: Shape, stride: Shape, quantizer: tuple[Any, ...], grad: bool
) -> CompositeEntry:
    dtype = storage.dtype
    if dtype is None or not dtype.startswith("q") or offset < 0:
        raise ValueError(f"a quantized tensor cannot have the dtype {dtype} and the offset {offset}")
    data = TensorEntry(shape, dtype, stride, offset, storage.span)
    last = shapes.extent(shape, stride)
    needed = (offset + last) * ITEM_BYTES[dtype] if last else 0
    if (sharing := _ELEMENTS_PER_BYTE.get(dtype)) is not None:
        # Strides do not tell where packed elements are, so the data is shown as bytes.
        nbytes = quantized_bytes(dtype, shape)
        data = TensorEntry((nbytes,), "uint8", (1,), offset // sharing, storage.span)
        needed = data.offset + nbytes
    if needed > storage.span.nbytes:
        raise ValueError(f"shape {list(shape)} needs {needed:,} bytes, but its storage holds {storage.span.nbytes:,}")
    parts = (data, *(part for part in quantizer if isinstance(part, TensorEntry)))
    made_by = _call("_rebuild_qtensor", storage, offset, shape, stride, quantizer, grad, OrderedDict())
    return CompositeEntry(shape, dtype, "strided", parts, _bytes_of(parts), made_by)


def _quantizer(value: Any, budget: limits.Budget) -> tuple[Any, ...]:
    """Check and return a scheme with a scale and a zero point, or with those of each channel and the channels' axis."""
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
    raise ValueError("a quantized tensor has no scale and zero point")


def _are_numbers(values: TensorEntry | list[Any], budget: limits.Budget) -> bool:
    if isinstance(values, TensorEntry):
        return True
    budget.spend(len(values))
    return all(isinstance(value, int | float) for value in values)


def quantized_bytes(dtype: str, shape: Shape) -> int:
    """Return the bytes that a quantized tensor takes. Elements of `quint4x2` share bytes, but rows do not."""
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
            raise ValueError(f"a sparse tensor of layout {layout!r} has no indices and values")
    shape = shapes.shape(sizes_in(size), where)
    made_by = _call(
        "_rebuild_sparse_tensor",
        Opaque(Global("torch.serialization", "_get_layout"), (f"torch.{layout}",)),
        (*parts, Opaque(Global("torch", "Size"), (shape,)), *more),
    )
    return CompositeEntry(shape, values.dtype, layout, parts, _bytes_of(parts), made_by)


def _wrapped(value: Opaque, where: str, budget: limits.Budget) -> CompositeEntry:
    """Return a tensor subclass that wraps other tensors; its call states its shape and dtype."""
    _, kind, args, state = value.args
    match args:
        case (Global(), Global(module="torch", name=dtype), size, *_) if dtype in ITEM_BYTES:
            shape = shapes.shape(sizes_in(size), where)
        case _:
            raise ValueError(f"a {kind.dotted} does not state its shape and dtype")
    parts = tuple(_parts_in(state, where, budget))
    if not parts:
        raise ValueError(f"a {kind.dotted} contains no tensor")
    grad = args[-1] if isinstance(args[-1], bool) else None
    return CompositeEntry(shape, dtype, kind.name, parts, _bytes_of(parts), value, requires_grad=grad)


def _parts_in(state: Any, where: str, budget: limits.Budget) -> Iterator[TensorEntry]:
    """Yield the plain tensors in the attributes of a tensor, in order, including those of nested composite tensors."""
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
