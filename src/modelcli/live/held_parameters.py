"""The parameters of a live model at one time, with where their values come from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import nn

from modelcli.checkpoints.copied import Copied
from modelcli.checkpoints.storage import Span
from modelcli.live.describe import dtype_name
from modelcli.live.sources import AnySource, Value, flag_of, is_lazy, source_of, stated_flag
from modelcli.live.surgery.storages import has_storage
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.parameter_origins import Held
from modelcli.values.conversion import Conversion


def held_parameters(module: nn.Module, *, flags_are_known: bool) -> Mapping[str, Held]:
    """Return the parameters of a model, each under its first name, in the order of `model.parameters()`.

    Args:
        module: the model.
        flags_are_known: whether its flags come from a record. Without one, `requires_grad` is True because the
            constructor makes it so, whatever the training program did; an edit may state it.
    """
    return {
        name: Held(
            id(parameter),
            _values_of(parameter),
            None if is_lazy(parameter) else tuple(parameter.shape),
            _flag(parameter, flags_are_known=flags_are_known),
        )
        for name, parameter in module.named_parameters()
    }


def _flag(parameter: nn.Parameter, *, flags_are_known: bool) -> bool | None:
    flag = flag_of(parameter)
    return None if flag and not flags_are_known and not stated_flag(parameter) else flag


def _values_of(parameter: torch.Tensor) -> Hashable:
    """Return what is equal for two parameters with the same elements: the bytes in a file that they are made of."""
    itself = ("identity", id(parameter))
    if not has_storage(parameter) or not parameter.numel():
        return itself
    found = source_of(parameter)
    if found is None:
        return itself
    source: AnySource = found
    dtype, view = dtype_name(parameter.dtype), (tuple(parameter.shape), tuple(parameter.stride()))
    while isinstance(source, Copied) or (isinstance(source, Conversion) and not source.start):
        if isinstance(source, Conversion):
            dtype, source = source.before, source.source
        else:
            source = source.original
    offset = int(parameter.storage_offset())
    if isinstance(source, Span):
        return (source.identity, source.offset + offset * ITEM_BYTES[dtype], view)
    return itself if isinstance(source, Value) else (source, offset, view)
