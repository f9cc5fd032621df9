"""Find out whether tensors with the same name mean the same in two modules, so that values can be copied over."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from modelcli.live import providers
from modelcli.live.surgery.settings import UNKNOWN, setting

#: What a norm is that takes the second axis for channels; providers call their own so.
NORM_OVER_CHANNELS = "a norm over channels"
#: Kinds of modules. Tensors with the same name mean the same in all classes of a kind.
_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("a linear layer", (nn.Linear,)),
    ("an embedding", (nn.Embedding, nn.EmbeddingBag)),
    (NORM_OVER_CHANNELS, (nn.modules.batchnorm._NormBase, nn.GroupNorm)),
    ("a norm over the last axes", (nn.LayerNorm, nn.RMSNorm)),
)
#: Names of classes that libraries without a provider have for a kind of torch.nn.
_BY_NAME = {"Conv1D": "a linear layer"}


@dataclass(frozen=True)
class CopyRule:
    """How to copy a tensor's values over: with swapped axes if `transposed`. `refusal` says why it is not possible."""

    transposed: bool = False
    refusal: str | None = None


def copy_rule(name: str, old: nn.Module, new: nn.Module, *, resampled: bool = False) -> CopyRule | None:
    """Return how to copy the values of a tensor from one module to another.

    Args:
        name: the tensor's path in both modules.
        old: the module that has the values.
        new: the module that gets them.
        resampled: whether kernels are given the new size before they are copied.

    Returns:
        How, or why not; None if one module lacks the tensor or the numbers of dimensions differ.
    """
    path, _, own = name.rpartition(".")
    had, has = _holder(old, path), _holder(new, path)
    before, after = _tensor(had, own), _tensor(has, own)
    if before is None or after is None or before.dim() != after.dim():
        return None
    if own == "weight" and _is_conv1d_of_gpt(had) != _is_conv1d_of_gpt(has) and kind_of(had) == kind_of(has):
        return CopyRule(transposed=True)
    one, other = kind_of(had), kind_of(has)
    if type(had) is not type(has) and (one is None or one != other) and not (one == other and _derived(had, has)):
        told = f"{type(had).__name__} is {one}, {type(has).__name__} {other}"
        means = f"{name} of {type(had).__name__} has another meaning in {type(has).__name__}"
        return CopyRule(refusal=f"{means}: {told}" if one and other else f"{means}, as far as modelcli knows")
    return CopyRule(refusal=_misplaced(name, had, has, before, after, resampled=resampled))


def transposed(old: nn.Module, new: nn.Module) -> tuple[str, ...]:
    """Return the names of the tensors whose axes are swapped when they are copied from one module to another."""
    rules = {name: copy_rule(name, old, new) for name in new.state_dict()}
    return tuple(name for name, rule in rules.items() if rule is not None and rule.transposed)


def _misplaced(
    name: str, had: nn.Module, has: nn.Module, before: torch.Tensor, after: torch.Tensor, *, resampled: bool
) -> str | None:
    """Return why copying the overlap would put values where they have another meaning; None if it would not."""
    if before.shape == after.shape and not isinstance(had, nn.RNNBase | nn.RNNCellBase):
        return _regrouped(name, had, has)
    if isinstance(had, _ConvNd) and before.shape[2:] != after.shape[2:] and not resampled:
        sizes = " and ".join("x".join(map(str, tensor.shape[2:])) for tensor in (before, after))
        return f"the kernels of {name} have the sizes {sizes}: the old one would fill only a corner of the new one"
    if isinstance(had, nn.RNNBase | nn.RNNCellBase):
        for argument in ("hidden_size", "proj_size"):
            was, now = (setting(module, argument) for module in (had, has))
            if was is not UNKNOWN and now is not UNKNOWN and was != now:
                return f"{name} has a block for each gate, but {argument} was {was} and is {now} now"
    if isinstance(had, nn.MultiheadAttention) and name.rpartition(".")[2].startswith("in_proj") and before.dim() < 3:
        return f"{name} stacks queries, keys and values, but their width has changed"
    return _regrouped(name, had, has)


def _regrouped(name: str, had: nn.Module, has: nn.Module) -> str | None:
    """Return why channels would get into other groups of a convolution; None if they would not."""
    if not isinstance(had, _ConvNd) or not isinstance(has, _ConvNd) or not name.endswith("weight"):
        return None
    if all(module.groups == module.in_channels for module in (had, has)):
        return None  # each channel has its own kernel
    if had.groups != has.groups:
        return f"{name} has {had.groups} groups of channels, but {has.groups} in the new module"
    if had.groups > 1 and (had.in_channels, had.out_channels) != (has.in_channels, has.out_channels):
        return f"the channels of {name} would get into others of its {had.groups} groups"
    return None


def copy_rule_by_shapes(name: str, before: torch.Tensor, new: nn.Module, *, resampled: bool = False) -> CopyRule | None:
    """Return how to copy a tensor of a plain state dict, judged by shapes alone. Arguments as in `copy_rule`."""
    path, _, own = name.rpartition(".")
    has = _holder(new, path)
    after = _tensor(has, own)
    if after is None or before.dim() != after.dim():
        return None
    if before.dim() > 2 and before.shape[2:] != after.shape[2:] and not resampled:
        sizes = " and ".join("x".join(map(str, tensor.shape[2:])) for tensor in (before, after))
        return CopyRule(
            refusal=f"the last axes of {name} have the sizes {sizes}: the old values would fill only a corner"
        )
    if isinstance(has, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention) and before.shape != after.shape:
        return CopyRule(refusal=f"{name} stacks blocks whose sizes have changed")
    return CopyRule()


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of a module; None if it has no kind whose tensors mean the same in all modules."""
    if isinstance(module, _ConvNd):
        return "a transposed convolution" if isinstance(module, _ConvTransposeNd) else "a convolution"
    if isinstance(module, nn.RNNBase):
        return f"a recurrent layer of the kind {module.mode.partition('_')[0]}"
    if isinstance(module, nn.RNNCellBase):
        return f"a recurrent layer of the kind {type(module).__name__.removesuffix('Cell')}"
    by_name = ChainMap(_BY_NAME, *(dict(half.layer_kinds) for half in providers.in_use()))
    for base in type(module).__mro__:
        if base.__name__ in by_name:
            return by_name[base.__name__]
    return next((kind for kind, classes in _KINDS if isinstance(module, classes)), None)


def _is_conv1d_of_gpt(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, a linear layer with weight `[in, out]`."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _derived(had: nn.Module, has: nn.Module) -> bool:
    """Whether one class is a subclass of the other."""
    return isinstance(had, type(has)) or isinstance(has, type(had))


def _holder(module: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            return nn.Module()
        module = child
    return module


def _tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    found = module._parameters.get(name)
    return found if found is not None else module._buffers.get(name)
