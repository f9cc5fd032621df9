"""What the forward pass keeps, compared with fake tensors that claim to be on a CUDA device.

PyTorch itself chooses the operators of those. Their forward pass runs everywhere; their backward pass needs a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from modelcli.live.calls import Calls
from modelcli.live.inputs import Arguments
from modelcli.live.memory_use.recorder import Recorder
from modelcli.live.memory_use.step import StepPlan, loss_of, make_step
from modelcli.model.memory_log import PlainAllocator, replay

#: Models without `scaled_dot_product_attention`, for which PyTorch asks the GPU what it is.
MODELS = ("alexnet", "mobilenet_v3_small", "swin_t", "resnet18", "convnext_tiny", "densenet121", "efficientnet_b0")
QUICK = ("alexnet", "mobilenet_v3_small")
CUDA = torch.device("cuda")


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name, num_classes=10, weights=None)  # type: ignore[no-any-return]


def on_fake_cuda(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(FakeTensor(mode, parameter.detach(), CUDA))
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = FakeTensor(mode, buffer, CUDA)
    return module


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Do what `torch.autocast("cuda")` does, which refuses to begin without a GPU."""
    if dtype is None:
        yield
        return
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def kept_on_fake_cuda(name: str, dtype: torch.dtype | None) -> int:
    mode = FakeTensorMode()
    module = on_fake_cuda(on_meta(name), mode).train()
    with mode:
        image = torch.empty(4, 3, 224, 224, device=CUDA)
    recorder = Recorder()
    recorder.calls = Calls(module, recorder)
    recorder.add(image, "activations")
    recorder.log.phase = "forward"
    with mode, recorder, autocast(dtype):
        output = module(image)
        loss, _, targets = loss_of(output)
        torch.clear_autocast_cache()
    for tensor in (*module.parameters(), *module.buffers()):
        recorder.become(tensor, "params")
    recorder.stop()
    del output, loss, targets
    return replay(recorder.log.events, PlainAllocator()).whole["activations"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.sweep) for name in MODELS]
)
def test_the_forward_pass_keeps_the_same_bytes(name: str, dtype: torch.dtype | None) -> None:
    step = make_step(on_meta(name), Arguments((torch.empty(4, 3, 224, 224, device="meta"),)), StepPlan("sgd", dtype))
    assert step.failure is None
    found = replay(step.log.steady(), PlainAllocator()).whole["activations"]
    assert found == kept_on_fake_cuda(name, dtype) > 0
