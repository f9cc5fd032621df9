"""Turn activation checkpointing on in a model, as its library does, else for each of its repeated blocks."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.utils import checkpoint

from modelcli.live.describe import walk


def turn_on(module: nn.Module) -> tuple[str, ...]:
    """Let a model keep no activations inside its blocks; the backward pass computes them again.

    A model of transformers or timm does so itself. In others, the blocks are the modules with children of their own
    that follow each other in a container, two or more of one class; the outermost ones count.

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
    """Return the outermost repeated blocks of a model."""
    found: dict[str, nn.Module] = {}
    for path, child in walk(module):
        if any(not above or path.startswith(f"{above}.") for above in found) and found:
            continue
        inner = [(name, each) for name, each in child._modules.items() if each is not None]
        for name, each in inner:
            alike = sum(type(other) is type(each) for _, other in inner)
            if alike >= 2 and any(below is not None for below in each._modules.values()) and _is_list(child):
                found[f"{path}.{name}" if path else name] = each
    unique = {id(each): (path, each) for path, each in reversed(found.items())}
    return list(reversed(unique.values()))


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
