"""A library of models, as anybody's: it knows nothing of modelcli."""

from __future__ import annotations

import torch
from torch import nn


@torch.library.custom_op("tiny::product", mutates_args=())
def product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A product of matrices that nothing but its library knows for one."""
    return one @ other


@product.register_fake
def _(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return one.new_empty(one.shape[0], other.shape[1])


class Product(nn.Module):
    """A linear layer without a bias, by the operator above."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(wide, narrow))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        product: torch.Tensor = torch.ops.tiny.product(x, self.weight)
        return product


def mlp(width: int = 8, classes: int = 2, pretrained: bool = False) -> nn.Module:
    """A perceptron for images of 4 x 4 pixels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.ReLU(), Product(width, classes))
    return load(model, fetch("https://models.invalid/mlp.pth")) if pretrained else model


def conv(classes: int = 2) -> nn.Module:
    """A convolution, the average of its pixels, and a classifier."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def fetch(address: str) -> dict[str, torch.Tensor]:
    """Download a state dict; there is none."""
    raise AssertionError(f"{address} was asked for")


def counted(model: nn.Module) -> dict[str, torch.Tensor]:
    """The published weights: 0, 1, 2 and so on, a thousandth of each."""
    return {
        name: torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape) / 1000
        for name, value in model.state_dict().items()
    }


def load(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """The model with these weights."""
    model.load_state_dict(weights)
    return model
