"""What the tensors of a checkpoint without an architecture tell of the module that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from modelcli.language.expressions import Call
from modelcli.live import modules
from modelcli.model.tensors import Shape

_CONVOLUTION = (3, 4, 5)
#: Arguments of constructors: of how many dimensions a `weight` is that tells them, and on which axis.
_TOLD_BY_WEIGHT: Mapping[str, tuple[tuple[int, ...], int]] = {
    "in_features": ((2,), 1),
    "out_features": ((2,), 0),
    "num_embeddings": ((2,), 0),
    "embedding_dim": ((2,), 1),
    "in_channels": (_CONVOLUTION, 1),
    "out_channels": (_CONVOLUTION, 0),
    "num_features": ((1,), 0),
    "num_channels": ((1,), 0),
    "num_parameters": ((1,), 0),
    "normalized_shape": ((1,), 0),
}


def argument_told(old: Mapping[str, Shape], kind: type[nn.Module], call: Call, name: str) -> Any:
    """The value of a constructor argument as the old tensors tell it, or None where they do not.

    `old` are the shapes of the old module's parameters, by their names in it. `call` is the new module's, and `kind`
    its class: a convolution's `in_channels` is known where it has one group, since its weight holds
    `in_channels / groups`; of a transposed one nothing is, since its weight is the other way round.
    """
    weight = old.get("weight")
    if weight is None:
        return None
    if name == "bias":
        return "bias" in old
    if len(weight) in _CONVOLUTION and issubclass(kind, _ConvTransposeNd):
        return None
    if name == "kernel_size" and len(weight) in _CONVOLUTION:
        return weight[2:]
    dimensions, axis = _TOLD_BY_WEIGHT.get(name, ((), 0))
    if len(weight) not in dimensions or (name == "in_channels" and _argument(call, kind, "groups", 1) != 1):
        return None
    return weight[axis]


#: Arguments that say how much flows in: nothing but a forward pass would show that it is another number now.
_FLOWS_IN = ("in_features", "in_channels", "num_features", "num_channels", "normalized_shape")


def notes(replaced: Iterable[tuple[Mapping[str, Shape], str, nn.Module]], calls: Iterable[Call]) -> list[str]:
    """A line for each new module that takes another width than the tensors of the old one say, which nothing checks
    where the architecture is not known. `replaced` are the shapes of the old modules' parameters, their paths, and the
    new modules.
    """
    told = []
    for (old, path, new), call in zip(replaced, calls, strict=True):
        for name in _FLOWS_IN:
            now = getattr(new, name, None)
            was = argument_told(old, type(new), call, name)
            if now is not None and was is not None and now not in (was, (was,)):
                told.append(f"{path}: the old tensors say {name}={was}, the new module takes {now}: _ keeps it")
    return told


def _argument(call: Call, kind: type[nn.Module], name: str, default: object) -> object:
    """What a call gives for an argument, by name or by position."""
    names = modules.parameter_names(kind)
    position = names.index(name) if name in names else len(call.args)
    return call.args[position] if position < len(call.args) else call.kwargs.get(name, default)
