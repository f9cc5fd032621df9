"""A model as it was, so that edits are all or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from modelcli.live.sources import named_tensors
from modelcli.live.walking import modules_in


@contextlib.contextmanager
def restored_on_error(module: nn.Module) -> Iterator[None]:
    """Put a module back as it was where the block raises: children, tensors, gradients, attributes; nothing is copied.

    Holds as long as edits give a tensor other data, and write nothing into the data that it has.
    """
    parts = [part for part in modules_in(module) if not isinstance(part, torch.jit.ScriptModule)]  # theirs are C++
    tables = [(part, dict(vars(part)), [dict(table) for table in _tables_of(part)]) for part in parts]
    tensors = [
        (tensor, tensor.data, tensor.requires_grad, tensor.grad if tensor.is_leaf else None, dict(vars(tensor)))
        for tensor in named_tensors(module).values()
    ]
    try:
        yield
    except BaseException:
        for tensor, data, trained, gradient, own in tensors:
            tensor.data = data
            tensor.requires_grad = trained  # the method is not for parameters without a shape
            vars(tensor).clear()
            vars(tensor).update(own)
            if gradient is not None:
                tensor.grad = gradient
        for part, attributes, saved in tables:
            vars(part).clear()
            vars(part).update(attributes)
            for table, before in zip(_tables_of(part), saved, strict=True):
                table.clear()
                table.update(before)
        raise


def _tables_of(part: nn.Module) -> list[dict[Any, Any]]:
    return [part._modules, part._parameters, part._buffers, part._state_dict_hooks]
