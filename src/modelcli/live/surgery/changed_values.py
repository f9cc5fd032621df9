"""New values for tensors that are computed from their old ones, element by element."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import nn

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

#: What an edit does to values: it gets some of a tensor's, and gives as many of the same dtype. It is called when the
#: values are written, so what torch cannot do with a dtype (`float8_e4m3fn` above all) is refused before.
Function = Callable[[torch.Tensor], torch.Tensor]


def change_values(module: nn.Module, names: Collection[str], function: Function) -> None:
    """Let a function make the new values of these tensors of a module.

    On the meta device nothing is read before the values are asked for, and then a piece at a time. Whatever shares the
    bytes of a tensor shows its new values too, as after an operation of torch in place.

    Args:
        names: of parameters and buffers; those without a storage of their own (lazy, sparse, quantized) are left out.
        function: gets a part of the values, of any shape, and does the same to each.
    """
    tensors = named_tensors(module)
    for name in names:
        tensor = tensors[name]
        if has_storage(tensor) and not tensor.is_meta and tensor.is_neg():
            tensor.data = tensor.data.resolve_neg()
    for views, source in _changed_storages(tensors, names, function):
        replace_storage(views, source)


def change_values_of_keys(model: StateDictModel, names: Collection[str], function: Function) -> StateDictModel:
    """The same for a model of which only keys are known: it with new values for these, which are not computed yet.

    `names` are keys of `model.tensors`: entries that are not dense have no values that could change.
    """
    tensors = meta_tensors(model, viewing(model, names))
    storages = {id(tensor): model.tensors[name].storage for name, tensor in tensors.items()}
    changed = _changed_storages(tensors, names, function)
    return model.with_sources({storages[id(views[0])]: source for views, source in changed})


def _changed_storages(
    tensors: Mapping[str, torch.Tensor], names: Collection[str], function: Function
) -> list[tuple[list[torch.Tensor], Computed]]:
    """The storages that change: all tensors that view each, and where its new bytes come from."""
    views: dict[int, dict[int, torch.Tensor]] = {}
    for tensor in tensors.values():
        if has_storage(tensor):
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
