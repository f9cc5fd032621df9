"""Turn activation checkpointing on in a model, as its library does, else for each of its repeated blocks."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.utils import checkpoint

from modelcli.live.describe import walk


def turn_on(module: nn.Module) -> tuple[str, ...]:
    """Let a model keep no activations inside its blocks; the backward pass computes them again.

    A model of transformers or timm does so itself. In others, the blocks are modules with children of their own in a
    container, two or more of one class; the outermost ones count.

    Returns:
        The paths of the blocks; `(".",)` if the library decides itself. Nothing if there are no blocks.
    """
    for name, arguments in (
        ("activation_checkpointing_enable", {"activation_checkpointing_kwargs": {"use_reentrant": False}}),
        ("gradient_checkpointing_enable", {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        ("set_grad_checkpointing", {"enable": True}),
    ):
        enable = getattr(module, name, None)
        if callable(enable):
            try:
                enable(**arguments)
            except (ValueError, AssertionError, NotImplementedError):  # this model does not support it
                continue
            return (".",)
    blocks = _blocks(module)
    for _, block in blocks:
        block.forward = functools.partial(_again, block.forward)
    return tuple(path for path, _ in blocks)


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the outermost repeated blocks of a model. A plain container is no block; what it holds may be some."""
    found: dict[str, nn.Module] = {}
    for path, child in walk(module):
        if not isinstance(child, _CONTAINERS) or any(f"{path}.".startswith(f"{above}.") for above in found):
            continue
        inner = dict(nn.Module.named_children(child))
        for name, each in inner.items():
            alike = sum(type(other) is type(each) for other in inner.values())
            has_children = any(True for _ in nn.Module.named_children(each))
            if alike >= 2 and has_children and type(each) not in _CONTAINERS:
                found[f"{path}.{name}" if path else name] = each
    by_module: dict[int, tuple[str, nn.Module]] = {}
    for path, child in walk(module):
        if path in found:
            by_module.setdefault(id(child), (path, child))
    return list(by_module.values())


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
