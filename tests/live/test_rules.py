"""The rules for `torch.nn` compared with the CPU: what they accept runs there, and what they refuse fails there.

The reference is a real forward pass. The meta device alone accepts much that the CPU refuses.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modelcli.live import rules, trace
from modelcli.live.meta_models import fake_copy, meta_copy
from tests.live.test_rules_against_cpu import Calls

SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (4,),
    (6,),
    (2, 4),
    (2, 6),
    (4, 8),
    (2, 4, 8),
    (4, 8, 8),
    (2, 6, 8),
    (2, 4, 8, 8),
    (2, 6, 8, 8),
    (2, 4, 8, 8, 8),
    (2, 8, 8, 8, 8),
    (2, 4, 8, 8, 8, 8),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)

MODULES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(4, 3),
    "Linear without bias": lambda: nn.Linear(4, 3, bias=False),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3),
    "Conv2d in groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "Conv3d": lambda: nn.Conv3d(4, 6, 3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(4, 6, 3),
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d without parameters": lambda: nn.BatchNorm2d(4, affine=False),
    "BatchNorm3d": lambda: nn.BatchNorm3d(4),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4, affine=True),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "InstanceNorm3d": lambda: nn.InstanceNorm3d(4, affine=True),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "LayerNorm over two axes": lambda: nn.LayerNorm([8, 8]),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "Embedding": lambda: nn.Embedding(10, 3),
    "LSTM": lambda: nn.LSTM(4, 3),
    "GRU": lambda: nn.GRU(8, 3, batch_first=True),
    "LSTMCell": lambda: nn.LSTMCell(4, 3),
    "Softmax": lambda: nn.Softmax(dim=2),
    "LogSoftmax": lambda: nn.LogSoftmax(dim=-2),
    "Softmax2d": lambda: nn.Softmax2d(),
    "GLU": lambda: nn.GLU(),
    "PReLU": lambda: nn.PReLU(),
    "PReLU by channel": lambda: nn.PReLU(4),
    "Flatten": lambda: nn.Flatten(),
    "Flatten from axis 2": lambda: nn.Flatten(2),
    "PixelShuffle": lambda: nn.PixelShuffle(2),
    "PixelUnshuffle": lambda: nn.PixelUnshuffle(3),
    "ChannelShuffle": lambda: nn.ChannelShuffle(2),
    "MaxPool1d": lambda: nn.MaxPool1d(2),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "MaxPool3d": lambda: nn.MaxPool3d(2),
    "AvgPool1d": lambda: nn.AvgPool1d(2),
    "AvgPool3d": lambda: nn.AvgPool3d(2),
    "AdaptiveAvgPool1d": lambda: nn.AdaptiveAvgPool1d(1),
    "AdaptiveAvgPool2d to 2 pixels": lambda: nn.AdaptiveAvgPool2d(2),
    "AdaptiveAvgPool3d": lambda: nn.AdaptiveAvgPool3d(1),
    "AdaptiveMaxPool1d": lambda: nn.AdaptiveMaxPool1d(1),
    "AdaptiveMaxPool3d": lambda: nn.AdaptiveMaxPool3d(1),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "Softmin": lambda: nn.Softmin(dim=1),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "RNN": lambda: nn.RNN(4, 3),
    "GRUCell": lambda: nn.GRUCell(4, 3),
    "EmbeddingBag": lambda: nn.EmbeddingBag(10, 3),
    "AvgPool2d": lambda: nn.AvgPool2d(2),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(1),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(1),
    "ReLU": lambda: nn.ReLU(),
    "Dropout": lambda: nn.Dropout(),
}


def runs_on_cpu(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    flow = torch.zeros(shape, dtype=dtype)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.eval()(flow)
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, AssertionError) as error:
        # A kernel that the CPU merely lacks says nothing about whether the input fits.
        if "not implemented for" in str(error) and dtype != torch.int64:
            pytest.skip(str(error))
        return False
    return True


def passes_the_check(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    flow = torch.zeros(shape, dtype=dtype, device="meta")
    return trace.run(meta_copy(module), [flow]).failure is None


def cases() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from itertools.product(MODULES, SHAPES)


@pytest.mark.parametrize(("name", "shape"), list(cases()), ids=lambda value: str(value))
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    dtype = torch.int64 if name.startswith("Embedding") else torch.float32
    module = MODULES[name]()
    assert passes_the_check(module, shape, dtype) == runs_on_cpu(module, shape, dtype)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(MODULES))
def test_dtypes(name: str, dtype: torch.dtype, own: torch.dtype) -> None:
    shape = {"1d": (2, 4, 8), "2d": (2, 4, 8, 8), "3d": (2, 4, 8, 8, 8)}.get(name.partition(" ")[0][-2:], (2, 4, 8))
    if name.startswith(("Linear", "LSTM", "RNN", "GRUCell", "EmbeddingBag")):
        shape = (2, 4)
    if name.startswith(("LayerNorm over", "Pixel", "Channel", "Softmax2d")):
        shape = (2, 4, 8, 8)
    module = MODULES[name]().to(own)
    if runs_on_cpu(module, shape, torch.int64 if name.startswith("Embedding") else own) is False:
        pytest.skip("the CPU has no kernel for this module in its own dtype")
    assert passes_the_check(module, shape, dtype) == runs_on_cpu(module, shape, dtype)


def test_a_misfit_says_what_flows_and_what_is_expected() -> None:
    misfit = rules.check(nn.Linear(4095, 10), (torch.zeros(1, 4096, device="meta"),), {})
    assert misfit == rules.Misfit("[1,4096] float32", "[*,4095]", "in_features", 4096)
    misfit = rules.check(nn.ConvTranspose2d(8, 2, 2), (torch.zeros(1, 4, 5, 5, device="meta"),), {})
    assert misfit == rules.Misfit("[1,4,5,5] float32", "8 channels", "in_channels", 4)
    assert rules.check(nn.Linear(4, 2), (), {"input": torch.zeros(1, 4)}) is None
    assert rules.check(nn.Identity(), (torch.zeros(1),), {}) is None


def test_fake_tensors_are_held_to_the_same_rules() -> None:
    """Fake tensors accept what the meta device accepts, and an operator that only their kernels refuse runs."""
    fake = FakeTensorMode()
    bytes_as_mask = Calls(lambda _, x: torch.where(x.to(torch.uint8), x, x))
    for module, fails in (
        (nn.Linear(4, 2, dtype=torch.bfloat16), True),
        (nn.Linear(4, 2), False),
        (bytes_as_mask, False),
    ):
        twin = fake_copy(module, fake)
        with fake:
            flow = torch.zeros(1, 4)
        seen = trace.run(twin, [flow], device="fake", modes=[fake])
        assert (seen.failure is not None) == fails, seen.failure


def test_a_forward_may_catch_what_the_cpu_would_raise() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return x @ self.w
            except RuntimeError:
                return x @ self.w.to(x.dtype)

    seen = trace.run(meta_copy(Tries()), [torch.zeros(1, 4, device="meta")])
    assert seen.failure is None
    assert seen.output.dtype == torch.float32


def test_an_operator_that_only_the_meta_device_refuses_runs() -> None:
    """On the CPU torch.where accepts a uint8 mask, with a deprecation warning."""
    module = Calls(lambda _, x: torch.where(x.to(torch.uint8), x, x))
    seen = trace.run(meta_copy(module), [torch.zeros(2, 4, device="meta")])
    assert (seen.failure, trace.shape_of(seen.output)) == (None, [2, 4])
