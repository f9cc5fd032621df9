"""Restore a model if an edit fails, so that edits are all or nothing."""

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
    """If the block raises, restore a module's children, tensors, gradients and attributes. Values are not copied.

    This works because edits give a tensor new data and never write into its old data.
    """
    parts = [
        part for part in modules_in(module) if not isinstance(part, torch.jit.ScriptModule)
    ]  # their tables are in C++
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
            tensor.requires_grad = trained  # `requires_grad_` fails for a parameter without a shape
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
