"""Compute new values of tensors from the old ones, element by element."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live.describe import dtype_name
from modelcli.live.sources import (
    AnySource,
    Computed,
    copy_into,
    named_tensors,
    real_storage,
    real_tensor,
    require_source,
)
from modelcli.live.surgery.state_dicts import meta_tensors, viewing
from modelcli.live.surgery.storages import has_storage, key_of, replace_storage
from modelcli.model.state_dict import StateDictModel

#: What an edit does to values: it gets some of a tensor's, and gives as many of the same dtype.
Function = Callable[[torch.Tensor], torch.Tensor]


def dense_tensors(model: nn.Module | StateDictModel) -> list[str]:
    """The names of the tensors whose values can change: not sparse, quantized or lazy, nor of a class of their own."""
    if isinstance(model, StateDictModel):
        return [
            name for name, tensor in model.tensors.items() if tensor.shape is not None and tensor.source is not None
        ]
    return [name for name, tensor in named_tensors(model).items() if _is_dense(tensor)]


def _is_dense(tensor: torch.Tensor) -> bool:
    return has_storage(tensor) and not hasattr(tensor, "__tensor_flatten__")


def change_values(module: nn.Module, names: Iterable[str], function: Function) -> None:
    """Replace the values of tensors of a module by those that a function computes.

    On the meta device nothing is read until the values are needed, and then piece by piece. Other tensors that share
    the bytes get the new values too, as after an in-place operation of torch.

    Args:
        module: on the meta device, or real.
        names: of parameters and buffers; those that `dense_tensors` leaves out are left alone.
        function: gets a part of the values, of any shape, and does the same to each.

    Raises RequestError, before anything changes, where torch cannot do that with the dtype of a tensor.
    """
    tensors = named_tensors(module)
    chosen = [name for name in names if _is_dense(tensors[name])]
    _require_dtypes(chosen, tensors, function)
    for name in chosen:
        if not tensors[name].is_meta and (tensors[name].is_conj() or tensors[name].is_neg()):
            tensors[name].data = tensors[name].data.resolve_conj().resolve_neg()
    for views, source in _changed_storages(tensors, chosen, function):
        replace_storage(views, source)


def change_values_of_keys(model: StateDictModel, names: Iterable[str], function: Function) -> StateDictModel:
    """The same for a model of which only keys are known: it with new values for these, which are not computed yet."""
    dense = frozenset(dense_tensors(model))
    chosen = [name for name in names if name in dense]
    tensors = meta_tensors(model, viewing(model, chosen))
    _require_dtypes(chosen, tensors, function)
    storages = {id(tensor): model.tensors[name].storage for name, tensor in tensors.items()}
    changed = _changed_storages(tensors, chosen, function)
    return model.with_sources({storages[id(views[0])]: source for views, source in changed})


def _require_dtypes(names: Iterable[str], tensors: Mapping[str, torch.Tensor], function: Function) -> None:
    """Try the function on one zero of each dtype: the values themselves are computed late, while a file is written."""
    first: dict[torch.dtype, str] = {}
    for name in names:
        first.setdefault(tensors[name].dtype, name)
    for dtype, name in first.items():
        zero = torch.zeros(dtype.itemsize, dtype=torch.uint8).view(dtype)
        try:
            with torch.no_grad():
                result = function(zero.clone())
        except RuntimeError as error:  # as torch raises for a dtype that an operation does not know
            reason = str(error).splitlines()[0]
            raise _not_with(dtype, name, f"torch says: {reason}") from error
        if result.dtype != dtype:
            raise _not_with(dtype, name, f"its new values would be {dtype_name(result.dtype)}")
        if result.shape != zero.shape:
            raise TypeError(f"the function gives values of shape {list(result.shape)} for {list(zero.shape)}")


def _not_with(dtype: torch.dtype, name: str, why: str) -> RequestError:
    return RequestError(
        f"{name} is {dtype_name(dtype)}, and this edit cannot be carried out on that dtype: {why}",
        f"leave {name} out, or give it another dtype first: cast {selectors.literal(name)} float32",
    )


def _changed_storages(
    tensors: Mapping[str, torch.Tensor], names: Collection[str], function: Function
) -> list[tuple[list[torch.Tensor], Computed]]:
    """The storages that change: all tensors that view each, and where its new bytes come from."""
    views: dict[int, dict[int, torch.Tensor]] = {}
    for tensor in tensors.values():
        if _is_dense(tensor):
            views.setdefault(key_of(tensor), {})[id(tensor)] = tensor
    chosen = {id(tensors[name]) for name in names}
    found = []
    for viewers in views.values():
        if picked := [view.detach() for key, view in viewers.items() if key in chosen and view.numel()]:
            source = require_source(picked[0])
            found.append(([*viewers.values()], _changed(source, picked, function)))
    return found


def _changed(source: AnySource, picked: Sequence[torch.Tensor], function: Function) -> Computed:
    whole = picked[0]
    if len(picked) == 1 and whole.is_contiguous() and whole.nbytes == source.nbytes:
        flat = whole.view(-1)
        return Computed(source.nbytes, partial(_piece, flat, function), (source,))
    return Computed(source.nbytes, partial(_within, source, picked, function), (source,), step=max(source.nbytes, 1))


def _piece(flat: torch.Tensor, function: Function, start: int, nbytes: int) -> torch.UntypedStorage:
    """So many bytes of a storage that one tensor shows whole."""
    size = flat.element_size()
    values = function(real_tensor(flat[start // size : (start + nbytes) // size]))
    return values.contiguous().untyped_storage()


def _within(
    source: AnySource, picked: Sequence[torch.Tensor], function: Function, start: int, nbytes: int
) -> torch.UntypedStorage:
    """So many bytes of a storage that is shown in parts: what no picked tensor shows stays.

    Tensors that show the same bytes change them once.
    """
    before = real_storage(source.part(0, source.nbytes)).cpu()
    after = before.clone()
    for shown in picked:
        view = shown[tuple(slice(None if step else 1) for step in shown.stride())]  # of what is expanded, one
        old, new = (
            torch.empty(0, dtype=view.dtype).set_(storage, view.storage_offset(), view.size(), view.stride())
            for storage in (before, after)
        )
        copy_into(new, function(old.clone()))
    part = torch.empty(0, dtype=torch.uint8).set_(after)[start : start + nbytes]
    return part.clone().untyped_storage()
