"""Iterate over the modules of a model through torch's own tables, since a class may override `modules`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from modelcli.errors import RequestError

#: The methods that PyTorch calls on each module to list a model.
_LISTING_METHODS = ("named_modules", "named_parameters", "extra_repr", "_get_name")


def modules_in(model: nn.Module) -> Iterator[nn.Module]:
    """Yield each module of a model once, the model first, parents before children."""
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend(child for child in reversed(module._modules.values()) if child is not None)


def require_methods(model: nn.Module) -> nn.Module:
    """Return the model.

    Raises RequestError if an attribute hides a method that listing the model needs, or a tensor is nested.
    """
    for module in modules_in(model):
        for name in _LISTING_METHODS:
            if name in vars(module):
                kind = type(module).__name__
                raise RequestError(
                    f"{kind} has an attribute {name}, which hides the method of torch.nn.Module, so PyTorch cannot "
                    "list the model",
                    f"rename the attribute of {kind}",
                )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_nested:
                raise RequestError(
                    f"{name} of {type(module).__name__} is a nested tensor, which modelcli cannot show or write "
                    "because it has no single shape",
                    "store a plain tensor and its lengths, and make the nested tensor in forward",
                )
    return model
