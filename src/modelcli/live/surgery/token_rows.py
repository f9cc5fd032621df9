"""Give embeddings and linear layers another number of rows, one for each token, as transformers does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

#: The covariance of the old rows is multiplied by this, so that new rows lie close to their mean.
_SPREAD = 1e-9


def resize(modules: Sequence[nn.Module], rows: int) -> None:
    """Give modules that share their weights, or have weights of their own, another number of rows.

    Old rows are kept. New ones are drawn as `PreTrainedModel.resize_token_embeddings` draws them: from a normal
    distribution with the mean of the old rows and a billionth of their covariance.

    Args:
        modules: embeddings and linear layers, in the order in which new rows are drawn.
        rows: the new number of rows.
    """
    done: dict[int, nn.Parameter] = {}
    for module in modules:
        weight = module._parameters["weight"]
        assert weight is not None
        if id(weight) not in done:
            done[id(weight)] = _like(weight, _rows(module, weight, rows))
            done[id(done[id(weight)])] = done[id(weight)]
        module._parameters["weight"] = done[id(weight)]
        bias = module._parameters.get("bias")
        if bias is not None:
            if id(bias) not in done:
                done[id(bias)] = _like(bias, _biases(bias, rows))
            module._parameters["bias"] = done[id(bias)]
        if isinstance(module, nn.Linear):
            module.out_features = rows
        elif isinstance(module, nn.Embedding):
            module.num_embeddings = rows
            if module.padding_idx is not None and module.padding_idx >= rows:
                module.padding_idx = None


def _like(old: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=old.requires_grad)


def _rows(module: nn.Module, weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the old rows and new ones below them, or fewer rows."""
    before, width = weight.shape
    kept = weight.detach()[:rows]
    if rows <= before or weight.is_meta:
        return torch.cat([kept, kept.new_empty((max(rows - before, 0), width))])
    # transformers makes a whole layer first: what follows is drawn from the same place of the generator.
    if isinstance(module, nn.Linear):
        nn.Linear(width, rows, bias=module.bias is not None, dtype=weight.dtype)
    else:
        nn.Embedding(rows, width, dtype=weight.dtype)
    old = weight.detach().to(torch.float32)
    mean = old.mean(dim=0)
    centred = old - mean
    covariance = _SPREAD * (centred.T @ centred / before)
    if torch.distributions.constraints.positive_definite.check(covariance).all():
        drawn = torch.distributions.MultivariateNormal(mean, covariance).sample((rows - before,))
    else:
        drawn = mean[None, :].repeat(rows - before, 1)
    return torch.cat([kept, drawn.to(weight.dtype)])


def _biases(bias: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the old biases and new ones that are drawn around their mean, or fewer."""
    before, kept = bias.shape[0], bias.detach()[:rows]
    if rows <= before or bias.is_meta:
        return torch.cat([kept, kept.new_empty(max(rows - before, 0))])
    old = bias.detach().to(torch.float32)
    drawn = torch.empty(rows - before, dtype=bias.dtype).normal_(old.mean().item(), _SPREAD * old.std().item())
    return torch.cat([kept, drawn])
