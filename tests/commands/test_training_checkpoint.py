"""The rest of a training checkpoint after an edit: optimizers that follow, other state dicts, and notes on both."""

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


FOLLOWS = "the state in optimizer follows the edits"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["replace fc Linear(4,4)"], f"{FOLLOWS}; fc.weight, fc.bias are new in it, without state"),
        (["remove again", "remove shared"], FOLLOWS),
        (["append blocks Linear(4,4)"], f"{FOLLOWS}; blocks.2.weight, blocks.2.bias are new in it, without state"),
        (["add later Linear(4,4)"], f"{FOLLOWS}; later.weight, later.bias are new in it, without state"),
        (["freeze fc"], f"{FOLLOWS}; fc.weight, fc.bias are frozen and out of it"),
        (["freeze ."], "frozen and out of it; it has no parameters left"),
        (
            ["init fc.weight zeros"],
            f"{FOLLOWS}; the state of fc.weight was dropped and starts anew: its values are new",
        ),
        (["cast . bfloat16"], None),
        (["replace seq.2 GELU"], None),
        (["freeze fc", "unfreeze fc"], None),
    ],
)
def test_what_an_optimizer_has_anew_is_named(cli: Cli, train: str, lines: list[str], told: str | None) -> None:
    words = [word for line in lines for word in ("-e", line)]
    notes = " ".join(cli("apply", *words, "-m", train, *ARCH, "-o", "out.pth").err.split())
    assert "the rest of train.pth (epoch, optimizer) was kept; --bare drops it" in notes
    assert ("follows the edits" in notes) == (told is not None)
    assert told is None or told in notes
    before, after = (torch.load(path, weights_only=True)["optimizer"] for path in (train, "out.pth"))
    if told is None:
        assert after["param_groups"] == before["param_groups"]
        assert after["state"].keys() == before["state"].keys()
        assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    assert "optimizer" not in cli("apply", *words, "-m", train, *ARCH, "-o", "bare.pth", "--bare").err.replace(
        "(epoch, optimizer) was left out", ""
    )


def test_a_new_module_is_loaded_by_an_optimizer_of_the_edited_model(cli: Cli, train: str) -> None:
    cli("append", "blocks", "Linear(4,4)", "-m", train, *ARCH, "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    model = nets.Places()
    model.blocks.append(nn.Linear(4, 4))
    model.load_state_dict(written["model"])
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(written["optimizer"])
    names = {parameter: name for name, parameter in model.named_parameters()}
    before = torch.load(train, weights_only=True)["optimizer"]["state"]
    old = [name for name, _ in nets.Places().named_parameters()]
    assert {names[parameter] for parameter in optimizer.state} == {old[number] for number in before}
    for parameter, state in optimizer.state.items():
        assert torch.equal(state["exp_avg"], before[old.index(names[parameter])]["exp_avg"])


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            ["replace 0 Linear(2,3)"],
            "the state in opt[0] is as it was and may not fit: it has 2 parameters, ",
        ),
        (["rename 0.** first.**", "cast . float64"], None),
    ],
)
def test_an_optimizer_of_some_parameters_that_could_be_others(cli: Cli, lines: list[str], told: str | None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "opt": [optimizer.state_dict()]}, "train.pth")
    words = [word for line in lines for word in ("-e", line)]
    notes = cli("apply", *words, "-m", "train.pth", "--check", "none", "-o", "out.pth").err
    assert ("as it was" in notes) == (told is not None)
    assert (
        told is None or f"{told}the model has 4, and which of these is not known; create the optimizer again" in notes
    )
    before, after = (torch.load(path, weights_only=True)["opt"][0] for path in ("train.pth", "out.pth"))
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][1]["momentum_buffer"], before["state"][1]["momentum_buffer"])


@pytest.mark.parametrize(
    ("lines", "told", "count"),
    [
        (["cast . bfloat16"], "", 2),
        (["remove 0"], "", 2),
        (["replace 1 Linear(4,2)"], "; 1.weight, 1.bias are new in it, without state", 4),
        (["replace 2 Linear(2,3)"], "; 2.weight, 2.bias are new in it, without state", 2),
        (["unfreeze 1.bias"], "; 1.bias is new in it, without state", 3),
        (["freeze 2.bias"], "; 2.bias is frozen and out of it", 1),
    ],
)
def test_an_optimizer_of_the_head_is_known_by_its_shapes(cli: Cli, lines: list[str], told: str, count: int) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(model[2].parameters())
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "train.pth")
    words = [word for line in lines for word in ("-e", line)]
    notes = cli("apply", *words, "-m", "train.pth", "--check", "none", "-o", "out.pth").err
    assert f"{FOLLOWS}{told}\n" in notes if told else FOLLOWS not in notes
    written = torch.load("out.pth", weights_only=True)["optimizer"]
    assert written["param_groups"][0]["params"] == list(range(count))
    if count > 2:
        assert torch.equal(written["state"][count - 2]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


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


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_optimizer_that_knows_names(cli: Cli, prefix: str) -> None:
    """The form that FSDP and torch.distributed.checkpoint write."""
    state = nn.Linear(2, 2).state_dict()
    groups = [{"params": [f"{prefix}fc.bias", f"{prefix}fc.weight"], "lr": 0.1}]
    optimizer = {"state": {f"{prefix}fc.weight": {"step": torch.ones(())}}, "param_groups": groups}
    torch.save({"model": {f"fc.{k}": v for k, v in state.items()}, "optim": optimizer}, "train.pth")
    told = cli("rename", "fc.**", "head.**", "-m", "train.pth", "-o", "out.pth").err
    assert "the state in optim follows the edits" in told
    written = torch.load("out.pth", weights_only=True)["optim"]
    assert written["param_groups"] == [{"params": [f"{prefix}head.bias", f"{prefix}head.weight"], "lr": 0.1}]
    assert written["state"] == {f"{prefix}head.weight": {"step": torch.ones(())}}
    told = cli("replace", "fc", "Linear(2,3)", "-m", "train.pth", "-o", "out.pth", "--force").err
    assert "the state in optim follows the edits; fc.weight, fc.bias are new in it, without state" in told
    assert torch.load("out.pth", weights_only=True)["optim"]["state"] == {}


def test_an_optimizer_that_got_named_parameters(cli: Cli) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(list(model.named_parameters())[::-1], lr=0.1, momentum=0.9)
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "train.pth")
    cli(
        "apply", "-e", "rename 1.** head.**", "-e", "remove 0.bias", "-m", "train.pth", "--check", "none", "-o", "o.pth"
    )
    written = torch.load("o.pth", weights_only=True)["optimizer"]
    (group,) = written["param_groups"]
    assert (group["params"], group["param_names"]) == ([0, 1, 2], ["head.bias", "head.weight", "0.weight"])
    for number, old in enumerate((0, 1, 3)):
        momentum = optimizer.state_dict()["state"][old]["momentum_buffer"]
        assert torch.equal(written["state"][number]["momentum_buffer"], momentum)


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


@pytest.mark.parametrize(
    ("line", "is_dropped"), [("remove blocks.0", True), ("freeze fc", True), ("cast . bfloat16", False)]
)
def test_a_script_writes_no_stale_optimizer(cli: Cli, train: str, line: str, is_dropped: bool) -> None:
    for arch in ((), ARCH):
        found = cli("script", "-e", line, "-m", train, *arch, "-o", "out.pth")
        assert ("the script drops optimizer, whose state is that of the parameters before" in found.err) == is_dropped
        exec(compile(found.out, "script", "exec"), {})
        written = torch.load("out.pth", weights_only=True)
        assert (written["optimizer"] is None) == is_dropped
        assert written["epoch"] == 1


def test_a_script_says_that_it_edits_no_average(cli: Cli, train: str) -> None:
    told = cli("script", "-e", "freeze fc", "-m", train, "--also-ema").err
    assert "the script edits one state dict: other copies of the model, as --also-ema edits them, stay" in told
