"""Restore a model if an edit fails, so that edits are all or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
    restore = restoring(module)
    try:
        yield
    except BaseException:
        restore()
        raise


def restoring(module: nn.Module) -> Callable[[], None]:
    """Return a function that gives a module back its present children, tensors, gradients, attributes and classes."""
    parts = [
        part for part in modules_in(module) if not isinstance(part, torch.jit.ScriptModule)
    ]  # their tables are in C++
    tables = [(part, type(part), dict(vars(part)), [dict(table) for table in _tables_of(part)]) for part in parts]
    tensors = [
        (tensor, tensor.data, tensor.requires_grad, tensor.grad if tensor.is_leaf else None, dict(vars(tensor)))
        for tensor in named_tensors(module).values()
    ]

    def restore() -> None:
        for tensor, data, trained, gradient, own in tensors:
            tensor.data = data
            tensor.requires_grad = trained  # `requires_grad_` fails for a parameter without a shape
            vars(tensor).clear()
            vars(tensor).update(own)
            if gradient is not None:
                tensor.grad = gradient
        for part, kind, attributes, saved in tables:
            if type(part) is not kind:
                part.__class__ = kind  # a parametrization gives a module a class of its own
            vars(part).clear()
            vars(part).update(attributes)
            for table, before in zip(_tables_of(part), saved, strict=True):
                table.clear()
                table.update(before)

    return restore


#: The dicts of a module that an edit, or a function that wraps modules, may change.
_TABLES = (
    "_modules",
    "_parameters",
    "_buffers",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _tables_of(part: nn.Module) -> list[dict[Any, Any]]:
    return [vars(part)[name] for name in _TABLES if name in vars(part)]
