"""The modules in a model, by torch's own tables: a class may have an attribute of its own called `modules`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def modules_in(model: nn.Module) -> Iterator[nn.Module]:
    """Each module in a model once, itself first, parents before children."""
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend(child for child in reversed(module._modules.values()) if child is not None)
