"""Every torchvision builder frozen, cast and with other activations, compared with plain PyTorch.

`make test-long` tests all of them; other runs test a few small ones.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import modelcli
from modelcli.language.references import Source
from modelcli.live.opening import open_live
from tests.conftest import Cli
from tests.live.providers.test_torchvision import NAMES, plain
from tests.sampling import sampled

SMALL = ("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18", "efficientnet_b0", "regnet_y_400mf")
#: Builders whose code creates float32 coordinates, so that they do not run in bfloat16 in plain PyTorch either.
FLOAT32_INSIDE = ("raft_large", "raft_small")
#: Models with more multiply-accumulates than this are not run in bfloat16; only their structure is compared.
MOST_MACS = 6e9


def last_with_parameters(model: nn.Module) -> str:
    return [path for path, module in model.named_modules() if list(module.parameters(recurse=False))][-1]


def edited_plainly(model: nn.Module, last: str) -> nn.Module:
    """Apply the statements that a user would write."""
    model.requires_grad_(False)
    model.get_submodule(last).requires_grad_(True)
    model.bfloat16()
    activations = [path for path, module in model.named_modules() if isinstance(module, nn.ReLU | nn.SiLU)]
    for path in activations:
        model.set_submodule(path, nn.GELU())
    return model


def freeze_cast_and_replace(cli: Cli, name: str) -> None:
    live = open_live(Source(name))
    last = last_with_parameters(live.module)
    kinds = {type(module).__name__ for module in live.module.modules()} & {"ReLU", "SiLU"}
    lines = [f"freeze . --except {last}", "cast . bfloat16", *(f"replace '**:{kind}' GELU()" for kind in sorted(kinds))]
    words = (*(word for line in lines for word in ("-e", line)), "-m", name, "-o", "out.pth")
    if name in FLOAT32_INSIDE:
        error = cli("apply", *words, code=2).err
        assert "the model's own code converts this input to float32; --check none writes" in error
    cli("apply", *words, *(["--check", "none"] if name in FLOAT32_INSIDE else []))
    torch.manual_seed(0)
    expected = edited_plainly(plain(name), last)
    found = modelcli.load("out.pth")
    assert repr(found) == repr(expected)
    flags = {n: p.requires_grad for n, p in expected.named_parameters()}
    assert {n: p.requires_grad for n, p in found.named_parameters()} == flags
    theirs, ours = expected.state_dict(), found.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    inputs = live.inputs
    trace = modelcli.blueprint("out.pth").trace
    if inputs is not None and name in FLOAT32_INSIDE:
        with torch.inference_mode(), pytest.raises(RuntimeError, match="BFloat16"):
            expected.eval()(*(torch.randn(shape).bfloat16() for shape in inputs.shapes))
    elif inputs is not None and not inputs.as_list and trace is not None and (trace.macs or 1e99) <= MOST_MACS:
        given = [torch.randn(shape).bfloat16() for shape in inputs.shapes]
        with torch.inference_mode():
            assert _same(found.eval()(*given), expected.eval()(*given))
    del expected, found
    gc.collect()
    Path("out.pth").unlink()


def _same(found: object, expected: object) -> bool:
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        return all(_same(found[key], value) for key, value in expected.items())
    assert isinstance(expected, list | tuple)
    assert isinstance(found, list | tuple)
    return all(map(_same, found, expected))


@pytest.mark.parametrize("name", sampled(SMALL, one_in=5))
def test_freeze_cast_and_replace(cli: Cli, name: str) -> None:
    freeze_cast_and_replace(cli, name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SMALL])
def test_freeze_cast_and_replace_on_every_builder(cli: Cli, name: str) -> None:
    freeze_cast_and_replace(cli, name)


@pytest.mark.sweep
def test_no_builder_has_a_shared_module() -> None:
    """Therefore the tests of every edit have no shared module of a builder."""
    for name in NAMES:
        assert not any(module.shared_with is not None for module in open_live(Source(name)).describe().modules), name
