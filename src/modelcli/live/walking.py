"""The modules in a model, by torch's own tables: a class may have an attribute of its own called `modules`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from modelcli.errors import RequestError

#: Methods that PyTorch itself calls on each module to list a model.
_ASKED = ("named_modules", "named_parameters", "extra_repr", "_get_name")


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


def require_methods(model: nn.Module) -> nn.Module:
    """The model itself.

    Raises RequestError where an attribute hides a method without which no model can be listed, or a tensor is nested.
    """
    for module in modules_in(model):
        for name in _ASKED:
            if name in vars(module):
                kind = type(module).__name__
                raise RequestError(
                    f"{kind} has an attribute {name}, which hides the method of torch.nn.Module: PyTorch cannot list "
                    "such a model",
                    f"call the attribute of {kind} something else",
                )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_nested:
                raise RequestError(
                    f"{name} of {type(module).__name__} is a nested tensor, which has no one shape: modelcli shows and "
                    "writes tensors that have one",
                    "keep a plain tensor and its lengths, and make the nested one in forward",
                )
    return model
