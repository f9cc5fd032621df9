"""Models for the tests and for the story of the README, such as `nets.py:Net`."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


class Net(nn.Module):
    """Two convolutions with a BatchNorm between: 6 + 6 + 15 = 27 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 5, 1, bias=False)
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.offset = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.bn(self.conv1(x))) * self.scale + self.offset


class MyLinear(nn.Module):
    """A linear layer with parameters of its own."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(out_features, in_features))
        self.b = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W.T + self.b


class Tied(nn.Module):
    """An embedding tied to the output layer, a buffer that is not persistent, and a plain tensor attribute."""

    def __init__(self, words: int = 11, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(width, dtype=torch.float32), persistent=False)
        self.temperature = torch.tensor([2.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)) + self.positions) / self.temperature


class Unusual(nn.Module):
    """Nested containers, a ModuleDict, a shared, an uncalled and a lazy module, a parameter in a module that
    has children, and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        shared = nn.Linear(4, 4)
        self.first = nn.Sequential(OrderedDict([("lin", shared), ("act", nn.ReLU())]))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
        self.heads = nn.ModuleDict({"left": nn.Linear(4, 2), "right": nn.LazyLinear(3)})
        self.again = shared
        self.spare = nn.Conv2d(1, 1, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.again(self.first(x)) * self.gain
        for block in self.blocks:
            x = block(x)
        return {name: head(x) for name, head in self.heads.items()}


class Places(nn.Module):
    """A child in each kind of container: a Sequential, a ModuleList, a ModuleDict, one attribute, two attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.heads = nn.ModuleDict({"left": nn.Linear(4, 2), "right": nn.Linear(4, 3)})
        self.fc = nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)
        self.again = self.shared
        self.later = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.fc(self.seq(x))
        for block in self.blocks:
            x = block(x)
        x = self.again(self.shared(x))
        return {name: head(x) for name, head in self.heads.items()}


class Attending(nn.Module):
    """A module with one input around a module with three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


class Mixed(nn.Module):
    """A bfloat16 layer behind a float32 layer: it runs on the meta device and fails on the CPU."""

    def __init__(self, up: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, up, 1)
        self.deconv = nn.ConvTranspose2d(up, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deconv(self.conv(x))


class Deciding(nn.Module):
    """Its forward depends on values, so that it does not run on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x if x.sum() > 0 else -x)


class ByKeyword(nn.Module):
    """Its forward has a keyword-only argument."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, *, gain: float) -> torch.Tensor:
        return self.norm(self.body(x)) * gain


def build(depth: int = 2) -> nn.Module:
    """Return a model, for references to functions."""
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))


instance = nn.Sequential(nn.Linear(3, 2), nn.ReLU())


class Chain(nn.Module):
    """A stem, a norm, four alike layers and a head, all of which a step of an optimizer changes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.norm(self.stem(x))))


class TiedAndNormed(nn.Module):
    """A language model whose embedding is its output layer, with a parametrized layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.out = nn.Linear(4, 6)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.normed(self.embed(tokens)))
