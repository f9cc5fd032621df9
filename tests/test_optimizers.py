"""What a training checkpoint's optimizer still fits after an edit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import nets
from tests.conftest import Cli


@pytest.fixture
def train(folder: Any) -> str:
    """A training checkpoint as PyTorch's own documentation writes one, after a step."""
    model = nets.Places()
    optimizer = torch.optim.Adam(model.parameters())
    sum(output.sum() for output in model(torch.randn(3, 4)).values()).backward()
    optimizer.step()
    torch.save({"epoch": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, "train.pth")
    return "train.pth"


ARCH = ("--arch", "nets.py:Places")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            ["replace fc Linear(4,4)"],
            "the state in optimizer no longer fits fc.weight, fc.bias: make the optimizer anew",
        ),
        (["remove again", "remove shared"], "no longer fits shared.weight, shared.bias:"),
        (["append blocks Linear(4,4)"], "no longer fits heads.left.weight"),
        (["add later Linear(4,4)"], "no longer fits later.weight, later.bias:"),
        (["freeze fc", "cast . bfloat16", "init fc zeros"], None),
        (["replace seq.2 GELU"], None),
    ],
)
def test_what_no_longer_fits_is_named(cli: Cli, train: str, lines: list[str], told: str | None) -> None:
    words = [word for line in lines for word in ("-e", line)]
    notes = cli("apply", *words, "-m", train, *ARCH, "-o", "out.pth").err
    assert "what train.pth holds beside 'model' (epoch, optimizer) was kept; --bare drops it" in notes
    assert ("no longer fits" in notes) == (told is not None)
    assert told is None or told in " ".join(notes.split())
    # It is kept as it was, whatever is said of it.
    before, after = (torch.load(path, weights_only=True)["optimizer"] for path in (train, "out.pth"))
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    assert "optimizer" not in cli("apply", *words, "-m", train, *ARCH, "-o", "bare.pth", "--bare").err.replace(
        "(epoch, optimizer) was left out", ""
    )


def test_an_optimizer_of_fewer_parameters(cli: Cli) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    torch.save({"model": model.state_dict(), "opt": [optimizer.state_dict()]}, "train.pth")
    told = cli("replace", "1", "Linear(2,3)", "-m", "train.pth", "-o", "out.pth").err
    assert "opt[0] holds state for 2 parameters, and the model had 4: whether it still fits is not known" in told


def test_an_optimizer_that_knows_names(cli: Cli) -> None:
    """As FSDP and torch.distributed.checkpoint write it."""
    state = nn.Linear(2, 2).state_dict()
    groups = [{"params": ["fc.weight", "fc.bias"], "lr": 0.1}]
    optimizer = {"state": {"fc.weight": {"step": torch.ones(())}}, "param_groups": groups}
    torch.save({"model": {f"fc.{k}": v for k, v in state.items()}, "optim": optimizer}, "train.pth")
    told = cli("replace", "fc", "Linear(2,3)", "-m", "train.pth", "-o", "out.pth").err
    assert "the state in optim no longer fits fc.weight, fc.bias" in told
