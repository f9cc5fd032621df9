"""New values for tensors that are computed from their old ones, element by element."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
from modelcli.live.surgery.storages import has_storage, view_anew, viewers

#: What an edit does to values: it gets some of a tensor's, and gives as many of the same dtype.
Function = Callable[[torch.Tensor], torch.Tensor]


def change_values(module: nn.Module, names: Collection[str], function: Function) -> None:
    """Let a function make the new values of these tensors.

    On the meta device nothing is read before the values are asked for, and then a piece at a time. Whatever shares the
    bytes of a tensor shows its new values too, as after an operation of torch in place.

    Args:
        names: of parameters and buffers; those without a storage of their own (lazy, sparse, quantized) are left out.
        function: gets a part of the values, of any shape, and does the same to each.
    """
    tensors = named_tensors(module)
    chosen = {id(tensors[name]): tensors[name] for name in names if has_storage(tensors[name])}
    for tensor in chosen.values():
        if not tensor.is_meta and tensor.is_neg():
            tensor.data = tensor.data.resolve_neg()
    for views in viewers(module).values():
        if picked := [view.detach() for view in views if id(view) in chosen and view.numel()]:
            source = require_source(views[0])
            view_anew(views, _changed(source, picked, function))


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
