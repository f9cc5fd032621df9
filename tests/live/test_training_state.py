"""Notes after an edit of a training checkpoint: on optimizers that no longer fit, and on other state dicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import nets
from tests.conftest import Cli


@pytest.fixture
def train(folder: Any) -> str:
    """Write a training checkpoint, after one step, as PyTorch's documentation shows it."""
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
            "the state in optimizer no longer fits fc.weight, fc.bias: create the optimizer again",
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
    assert "the rest of train.pth (epoch, optimizer) was kept; --bare drops it" in notes
    assert ("no longer fits" in notes) == (told is not None)
    assert told is None or told in " ".join(notes.split())
    # It is unchanged, whatever the notes say.
    before, after = (torch.load(path, weights_only=True)["optimizer"] for path in (train, "out.pth"))
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    assert "optimizer" not in cli("apply", *words, "-m", train, *ARCH, "-o", "bare.pth", "--bare").err.replace(
        "(epoch, optimizer) was left out", ""
    )


def test_an_optimizer_of_fewer_parameters(cli: Cli) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "opt": [optimizer.state_dict()]}, "train.pth")
    told = cli("replace", "1", "Linear(2,3)", "-m", "train.pth", "-o", "out.pth").err
    assert "opt[0] has state for 2 parameters, but the model had 4: whether it still fits 1.weight, 1.bias" in told


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["freeze .", "cast . bfloat16", "init . zeros"], None),
        (["replace 0 Linear(5,3)"], None),
        (["replace 1 Linear(3,3)"], "whether it still fits 1.bias is not known"),
        (["replace 2 Linear(3,2)"], "whether it still fits 2.weight, 2.bias is not known"),
    ],
)
def test_an_optimizer_of_the_head_is_told_of_where_the_head_may_have_changed(
    cli: Cli, lines: list[str], told: str | None
) -> None:
    """An optimizer's parameters are known only by shape, and a parameter of `1` has the shape of one in the head."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(model[2].parameters())
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "train.pth")
    words = [word for line in lines for word in ("-e", line)]
    notes = cli("apply", *words, "-m", "train.pth", "-o", "out.pth").err
    assert ("whether it still fits" in notes) == (told is not None)
    assert told is None or told in notes


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("freeze fc", None),
        ("init fc zeros", "the state dict in {} is unchanged: --key {} edits it"),
        ("replace fc Linear(4,4)", "the state dict in {} is unchanged: --key {} edits it"),
        (
            "replace heads.left Linear(4,5)",
            "the state dict in {} is unchanged and no longer fits heads.left.weight, heads.left.bias: "
            "--key {} edits it",
        ),
        ("add extra Linear(4,5)", "the state dict in {} is unchanged and no longer fits extra.weight, extra.bias:"),
    ],
)
@pytest.mark.parametrize("place", ["ema", "averages.state"])
def test_another_state_dict_is_told_of(cli: Cli, line: str, told: str | None, place: str) -> None:
    state = nets.Places().state_dict()
    copy: dict[str, Any] = {f"module.{name}": tensor.clone() for name, tensor in state.items()}
    for name in reversed(place.split(".")):
        copy = {name: copy}
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, **copy}, "train.pth")
    notes = cli("apply", "-e", line, "-m", "train.pth", *ARCH, "-o", "out.pth").err
    assert ("the state dict in" in notes) == (told is not None)
    assert told is None or told.format(place, place) in notes
    assert "the state dict in" not in cli("apply", "-e", line, "-m", "train.pth", *ARCH, "-o", "b.pth", "--bare").err


def test_a_renamed_key_is_one_that_no_longer_fits(cli: Cli) -> None:
    state = nets.Places().state_dict()
    torch.save({"model": state, "ema": dict(state), "epoch": 1}, "train.pth")
    notes = cli("rename", "**", "body.**", "-m", "train.pth", "-o", "out.pth").err
    names = list(state)
    told = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    assert f"the state dict in ema is unchanged and no longer fits {told}: --key ema" in notes


def test_an_optimizer_that_knows_names(cli: Cli) -> None:
    """The form that FSDP and torch.distributed.checkpoint write."""
    state = nn.Linear(2, 2).state_dict()
    groups = [{"params": ["fc.weight", "fc.bias"], "lr": 0.1}]
    optimizer = {"state": {"fc.weight": {"step": torch.ones(())}}, "param_groups": groups}
    torch.save({"model": {f"fc.{k}": v for k, v in state.items()}, "optim": optimizer}, "train.pth")
    told = cli("replace", "fc", "Linear(2,3)", "-m", "train.pth", "-o", "out.pth").err
    assert "the state in optim no longer fits fc.weight, fc.bias" in told


def test_a_prefix_that_is_not_written_again_is_told_of(cli: Cli) -> None:
    """The program that wrote `module.fc.weight` will expect that key when it resumes."""
    state = {f"module.{name}": tensor for name, tensor in nets.Places().state_dict().items()}
    torch.save({"model": state, "epoch": 1}, "train.pth")
    notes = " ".join(cli("init", "fc", "zeros", "-m", "train.pth", *ARCH, "-o", "out.pth").err.split())
    assert "the keys in 'model' were written without 'module.'" in notes
    assert "(without --arch, an edit leaves the keys as they are)" in notes
    assert [f"module.{name}" for name in torch.load("out.pth", weights_only=True)["model"]] == list(state)
    assert "were written without" not in cli("init", "module.fc", "zeros", "-m", "train.pth", "-o", "b.pth").err
    assert list(torch.load("b.pth", weights_only=True)["model"]) == list(state)


@pytest.mark.parametrize(("key", "other"), [("model", "ema"), ("ema", "model")])
def test_each_of_two_state_dicts_is_told_of_the_other(cli: Cli, key: str, other: str) -> None:
    """`--key` chooses the state dict to edit; the other one is unchanged, whichever comes first."""
    state = nets.Places().state_dict()
    torch.save({"model": state, "ema": {name: tensor + 1 for name, tensor in state.items()}}, "train.pth")
    words = ("replace", "fc", "Linear(4,4)", "--key", key, "-m", "train.pth", *ARCH, "-o", "out.pth")
    notes = cli(*words).err
    assert f"the state dict in {other} is unchanged: --key {other} edits it" in notes
    before, after = (torch.load(path, weights_only=True) for path in ("train.pth", "out.pth"))
    assert all(torch.equal(after[other][name], tensor) for name, tensor in before[other].items())
    assert not torch.equal(after[key]["fc.weight"], before[key]["fc.weight"])
    assert torch.equal(after[key]["seq.0.weight"], before[key]["seq.0.weight"])
