"""Whether two modules mean the same by a tensor of one name, so that values can be carried from one to the other."""

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
#: Kinds of modules whose tensors of one name mean the same, whatever class of the kind it is.
_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("a linear layer", (nn.Linear,)),
    ("an embedding", (nn.Embedding, nn.EmbeddingBag)),
    (NORM_OVER_CHANNELS, (nn.modules.batchnorm._NormBase, nn.GroupNorm)),
    ("a norm over the last axes", (nn.LayerNorm, nn.RMSNorm)),
)
#: Names of classes that libraries without a provider have for a kind of torch.nn.
_BY_NAME = {"Conv1D": "a linear layer"}


@dataclass(frozen=True)
class Carrying:
    """How a tensor is carried over: its old axes swapped where `transposed`. `refusal` says why it cannot be."""

    transposed: bool = False
    refusal: str | None = None


def carrying(name: str, old: nn.Module, new: nn.Module) -> Carrying | None:
    """How the values of a tensor go from one module to another.

    Args:
        name: the tensor's path in both.
        old: the module that has the values.
        new: the module that is to have them.

    Returns:
        How, or why not; None where the new module has room for none of them (another number of dimensions).
    """
    path, _, own = name.rpartition(".")
    had, has = _holder(old, path), _holder(new, path)
    before, after = _tensor(had, own), _tensor(has, own)
    if before is None or after is None or before.dim() != after.dim():
        return None
    if own == "weight" and _is_conv1d_of_gpt(had) != _is_conv1d_of_gpt(has) and kind_of(had) == kind_of(has):
        return Carrying(transposed=True)
    one, other = kind_of(had), kind_of(has)
    if type(had) is not type(has) and (one is None or one != other) and not (one == other and _derived(had, has)):
        told = f"{type(had).__name__} is {one}, {type(has).__name__} {other}"
        means = f"{name} of {type(had).__name__} does not mean the same in {type(has).__name__}"
        return Carrying(refusal=f"{means}: {told}" if one and other else f"{means}, as far as anything says")
    return Carrying(refusal=_misplaced(name, had, has, before, after))


def transposed(old: nn.Module, new: nn.Module) -> tuple[str, ...]:
    """The names of the tensors whose axes are swapped on their way from one module to another."""
    ways = {name: carrying(name, old, new) for name in new.state_dict()}
    return tuple(name for name, way in ways.items() if way is not None and way.transposed)


def _misplaced(name: str, had: nn.Module, has: nn.Module, before: torch.Tensor, after: torch.Tensor) -> str | None:
    """Why the overlap of two tensors of one kind would put values where they mean something else, or None."""
    if before.shape == after.shape and not isinstance(had, nn.RNNBase | nn.RNNCellBase):
        return _regrouped(name, had, has)
    if isinstance(had, _ConvNd) and before.shape[2:] != after.shape[2:]:
        sizes = " and ".join("x".join(map(str, tensor.shape[2:])) for tensor in (before, after))
        return f"the kernels of {name} are of the sizes {sizes}: the old one would lie in a corner of the new one"
    if isinstance(had, nn.RNNBase | nn.RNNCellBase):
        for argument in ("hidden_size", "proj_size"):
            was, now = (setting(module, argument) for module in (had, has))
            if was is not UNKNOWN and now is not UNKNOWN and was != now:
                return f"{name} holds a block for each gate, and {argument} was {was} and is {now} now"
    if isinstance(had, nn.MultiheadAttention) and name.rpartition(".")[2].startswith("in_proj") and before.dim() < 3:
        return f"{name} holds queries, keys and values one below the other, and their width is another now"
    return _regrouped(name, had, has)


def _regrouped(name: str, had: nn.Module, has: nn.Module) -> str | None:
    """Why channels would come into other groups of a convolution, or None."""
    if not isinstance(had, _ConvNd) or not isinstance(has, _ConvNd) or not name.endswith("weight"):
        return None
    if all(module.groups == module.in_channels for module in (had, has)):
        return None  # each channel has a kernel of its own
    if had.groups != has.groups:
        return f"{name} has {had.groups} groups of channels, and {has.groups} in the new module"
    if had.groups > 1 and (had.in_channels, had.out_channels) != (has.in_channels, has.out_channels):
        return f"{name} has its channels in {had.groups} groups, which would be others"
    return None


def carrying_by_shapes(name: str, before: torch.Tensor, new: nn.Module) -> Carrying | None:
    """The same for a tensor of a checkpoint that does not say what its modules are: the shapes alone tell."""
    path, _, own = name.rpartition(".")
    has = _holder(new, path)
    after = _tensor(has, own)
    if after is None or before.dim() != after.dim():
        return None
    if before.dim() > 2 and before.shape[2:] != after.shape[2:]:
        sizes = " and ".join("x".join(map(str, tensor.shape[2:])) for tensor in (before, after))
        return Carrying(refusal=f"the last axes of {name} have the sizes {sizes}: values would lie in a corner")
    if isinstance(has, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention) and before.shape != after.shape:
        return Carrying(refusal=f"{name} holds blocks one below the other, whose sizes are others now")
    return Carrying()


def kind_of(module: nn.Module) -> str | None:
    """What a module is, where its tensors mean the same in all modules that are the same."""
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
    """Whether it is the `Conv1D` of transformers: a linear layer whose weight is `[in, out]`."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _derived(had: nn.Module, has: nn.Module) -> bool:
    """Whether one class is made from the other."""
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
