"""Carry the weights of a convolution over to another number of input channels, summed or averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from modelcli.edits.kept_weights import MEAN
from modelcli.live.script.source_text import dedented
from modelcli.live.sources import computed_tensor, real_tensor, require_source


@dataclass(frozen=True)
class ChannelRule:
    """How a weight goes over to `channels` input channels: `sum` or `mean`."""

    channels: int
    how: str

    @property
    def function(self) -> str:
        """The name of the function that does it in a script."""
        return f"{self.how}_channels"

    @property
    def argument(self) -> int:
        return self.channels

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the new weight."""
        return (before[0], self.channels, *before[2:])

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with the new input channels. On the meta device the values are computed when needed."""
        if not weight.is_meta:
            return adapted(weight.detach(), self.channels, self.how)
        old = weight.detach()
        compute = partial(_adapted_values, old, self)
        return computed_tensor(self.shape(tuple(old.shape)), old.dtype, compute, [require_source(old)])

    def told(self, before: tuple[int, ...]) -> str:
        """Say what happens to the input channels of a weight of this shape."""
        if self.how == MEAN:
            return f"the mean of {before[1]} input channels for each of {self.channels}"
        if self.channels == 1:
            return f"{before[1]} input channels summed to 1"
        return f"{before[1]} input channels repeated and rescaled to {self.channels}"


def rule_for(name: str, before: torch.Tensor, new: nn.Module, how: str) -> ChannelRule | None:
    """Return the rule for a tensor of a new module; None if it is no weight of a convolution with other input channels.

    Args:
        name: the tensor's path in the new module.
        before: the old tensor.
        new: the new module.
        how: what `--keep-weights` says.
    """
    path, _, own = name.rpartition(".")
    holder = new.get_submodule(path)
    if own != "weight" or not isinstance(holder, _ConvNd) or isinstance(holder, _ConvTransposeNd):
        return None
    if holder.groups != 1 or before.dim() != holder.weight.dim() or before.shape[1] == holder.in_channels:
        return None
    return ChannelRule(holder.in_channels, how)


def adapted(weight: torch.Tensor, channels: int, how: str) -> torch.Tensor:
    """Return the values of a weight for another number of input channels, computed in float32 at least.

    `sum` is what timm's `adapt_input_conv` does: one channel gets the sum over the old ones; several get the old ones
    in turn, scaled so that the sum over all channels stays about the same. With `mean` each channel gets the mean.
    """
    values = weight if weight.dtype in (torch.float64, torch.complex64, torch.complex128) else weight.float()
    before, more = weight.shape[1], (1,) * (weight.dim() - 2)
    if how == MEAN:
        made = values.mean(dim=1, keepdim=True).repeat(1, channels, *more)
    elif channels == 1:
        made = values.sum(dim=1, keepdim=True)
    else:
        made = values.repeat(1, math.ceil(channels / before), *more)[:, :channels] * (before / float(channels))
    return made.to(weight.dtype).contiguous()


def _adapted_values(weight: torch.Tensor, rule: ChannelRule) -> torch.Tensor:
    return adapted(real_tensor(weight), rule.channels, rule.how)


#: The same as functions of a script, by their names.
FUNCTIONS = {
    "sum_channels": dedented('''
        def sum_channels(old, channels):
            """Sum the input channels of weights in a state dict if one is wanted, else repeat and rescale them."""
            for name, number in channels.items():
                weight = old[name].float()
                if number == 1:
                    weight = weight.sum(dim=1, keepdim=True)
                else:
                    before, more = weight.shape[1], (1,) * (weight.dim() - 2)
                    weight = weight.repeat(1, -(-number // before), *more)[:, :number] * (before / number)
                old = {**old, name: weight.to(old[name].dtype)}
            return old
    '''),
    "mean_channels": dedented('''
        def mean_channels(old, channels):
            """Give each of the wanted input channels of weights in a state dict the mean over the old ones."""
            for name, number in channels.items():
                weight = old[name].float().mean(dim=1, keepdim=True)
                weight = weight.repeat(1, number, *(1,) * (weight.dim() - 2))
                old = {**old, name: weight.to(old[name].dtype)}
            return old
    '''),
}
