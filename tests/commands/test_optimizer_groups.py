"""Which parameters an optimizer in a file has, in groups of several kinds; and optimizers that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests import nets
from tests.conftest import Cli


def decay(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups with and without weight decay, as nanoGPT, timm and transformers make them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def head_faster(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups of the body and of the head."""
    head = {id(p) for p in model.head.parameters()}
    return [
        {"params": [p for p in model.parameters() if id(p) not in head and p.requires_grad], "lr": 0.001},
        {"params": [p for p in model.head.parameters() if p.requires_grad], "lr": 0.1},
    ]


def saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Train for two steps, and write a training checkpoint."""
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "train.pth")


@pytest.mark.parametrize("arch", [(), ("--arch", "nets.py:Chain")])
@pytest.mark.parametrize("groups", [decay, head_faster])
def test_groups_keep_their_parameters(
    cli: Cli, groups: Callable[[nn.Module], list[dict[str, Any]]], arch: tuple[str, ...]
) -> None:
    """The optimizer that loads the result is made for the edited model by the same function."""
    torch.manual_seed(0)
    model = nets.Chain()
    optimizer = torch.optim.AdamW(groups(model))
    saved(model, optimizer)
    lines = ("-e", "replace head Linear(6,5)", "-e", "slice layers 0,2", "-e", "freeze stem.bias")
    notes = cli("apply", *lines, "-m", "train.pth", *arch, "-o", "out.pth").err
    assert "head.weight, head.bias are new in it, without state" in notes
    edited = nets.Chain()
    edited.head = nn.Linear(6, 5)
    edited.layers = nn.Sequential(edited.layers[0], edited.layers[2])
    edited.stem.bias.requires_grad_(False)
    written = torch.load("out.pth", weights_only=True)
    edited.load_state_dict(written["model"])
    resumed = torch.optim.AdamW(groups(edited))
    resumed.load_state_dict(written["optimizer"])
    old = dict(model.named_parameters())
    for name, parameter in edited.named_parameters():
        before = old[name.replace("layers.1", "layers.2")]
        if name in ("head.weight", "head.bias", "stem.bias"):
            assert parameter not in resumed.state
            continue
        for key, value in optimizer.state[before].items():
            assert torch.equal(resumed.state[parameter][key], value)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in resumed.param_groups]
    assert settings == [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def test_an_empty_group_stays(cli: Cli) -> None:
    """torch compares the number of groups; one without parameters is none that it refuses."""
    model = nets.Chain()
    saved(model, torch.optim.AdamW(head_faster(model)))
    cli("freeze", "head", "-m", "train.pth", "-o", "out.pth")
    model.head.requires_grad_(False)
    resumed = torch.optim.AdamW(head_faster(model))
    resumed.load_state_dict(torch.load("out.pth", weights_only=True)["optimizer"])
    assert [len(group["params"]) for group in resumed.param_groups] == [12, 0]


def test_groups_that_only_their_order_tells_are_assumed(cli: Cli) -> None:
    model = nets.Chain()
    saved(model, torch.optim.SGD([{"params": list(model.parameters())[:8]}, {"params": list(model.parameters())[8:]}]))
    notes = cli("remove", "norm", "-m", "train.pth", "-o", "out.pth").err
    assert "its 2 groups were taken to have the parameters in the order of the model" in notes
    groups = torch.load("out.pth", weights_only=True)["optimizer"]["param_groups"]
    assert [group["params"] for group in groups] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_parameters_in_an_order_of_their_own_are_not_known(cli: Cli) -> None:
    model = nets.Chain()
    saved(model, torch.optim.Adam(list(model.parameters())[::-1]))
    notes = cli("freeze", "stem", "-m", "train.pth", "-o", "out.pth").err
    assert "is as it was and may not fit: it has state of the shape [3] where stem.weight [6, 4] is" in notes


def test_keys_in_alphabetical_order_are_not_known(cli: Cli) -> None:
    """A bias comes before its weight there, which says nothing of the order in the model."""
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(2)))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    saved(model, optimizer)
    state = dict(sorted(model.state_dict().items()))
    torch.save({"model": state, "optimizer": optimizer.state_dict()}, "train.pth")
    notes = cli("freeze", "0.weight", "-m", "train.pth", "-o", "out.pth").err
    assert "the keys of the file are in alphabetical order, not in the order of model.parameters()" in notes
    notes = cli(
        "freeze", "0.weight", "-m", "train.pth", "--arch", "Sequential(BatchNorm1d(4), BatchNorm1d(4))", "-o", "o.pth"
    ).err
    assert "0.weight is frozen and out of it" in notes


def test_tied_weights_are_one_parameter(cli: Cli) -> None:
    model = nets.Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "train.pth")
    cli("untie", "head.weight", "-m", "train.pth", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)["optimizer"]
    assert written["param_groups"][0]["params"] == [0, 1, 2, 3]
    copied, first = written["state"][3], written["state"][0]
    assert torch.equal(copied["exp_avg"], first["exp_avg"])
    assert copied["exp_avg"].data_ptr() != first["exp_avg"].data_ptr()
    assert copied["step"].data_ptr() != first["step"].data_ptr()


@pytest.mark.parametrize("kind", ["Adafactor", "LBFGS"])
def test_state_of_other_shapes_moves_and_is_not_taken_apart(cli: Cli, kind: str) -> None:
    torch.manual_seed(0)
    model = nets.Chain()
    optimizer = getattr(torch.optim, kind)(model.parameters())
    data = torch.randn(5, 4)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(data).square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "train.pth")
    notes = cli("rename", "stem.**", "first.**", "-m", "train.pth", "-o", "out.pth").err
    assert "optimizer" not in notes.replace("(optimizer) was kept", "")
    notes = cli("remove", "norm", "-m", "train.pth", "-o", "removed.pth").err
    removed = torch.load("removed.pth", weights_only=True)["optimizer"]
    if kind == "LBFGS":
        assert "the state of stem.weight was dropped and starts anew: it is one vector of all parameters" in notes
        assert removed["state"] == {}
        return
    assert torch.equal(removed["state"][2]["row_var"], optimizer.state_dict()["state"][4]["row_var"])
    notes = cli("split", "stem.weight", "a", "b", "-m", "train.pth", "-o", "split.pth").err
    assert "the state of a, b was dropped and starts anew: row_var [6, 1] has not the shape [6, 4]" in notes
    split = torch.load("split.pth", weights_only=True)["optimizer"]
    assert split["state"].keys() == set(range(2, 15))


def test_joined_parameters_with_different_steps_start_anew(cli: Cli) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(model.parameters())
    for used in (model, model[1]):
        optimizer.zero_grad()
        used(torch.randn(3, 2)).sum().backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "train.pth")
    notes = cli("concat", "0.weight", "1.weight", "both", "-m", "train.pth", "-o", "out.pth").err
    assert "the state of both was dropped and starts anew: step is not the same for 0.weight, 1.weight" in notes
    assert torch.load("out.pth", weights_only=True)["optimizer"]["state"].keys() == {1, 2}


GROUP = {"lr": 0.1, "params": [0, 1]}
STATE = {0: {"momentum_buffer": torch.ones(2, 2)}, 1: {"momentum_buffer": torch.ones(2)}}


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (None, None),
        ({"state": STATE, "param_groups": None}, "its param_groups are None, not a list"),
        ({"state": STATE, "param_groups": {"params": [0]}}, "its param_groups are a dict, not a list"),
        ({"state": None, "param_groups": [GROUP]}, "its state is None, not a dict"),
        ({"state": STATE, "param_groups": [None]}, "param_groups[0] has no list params"),
        ({"state": STATE, "param_groups": [{"params": 2}]}, "param_groups[0] has no list params"),
        ({"state": STATE, "param_groups": [{"params": [0, 0]}]}, "a parameter is in its params twice"),
        ({"state": STATE, "param_groups": [GROUP, GROUP]}, "a parameter is in its params twice"),
        ({"state": STATE, "param_groups": [{"params": [0, "a"]}]}, "'a' in its params is no number like the others"),
        ({"state": STATE, "param_groups": [{"params": [[0], 1]}]}, "a list in its params is no number like the others"),
        ({"state": {**STATE, 7: {}}, "param_groups": [GROUP]}, "it has state for a parameter 7 that is in no group"),
        ({"state": STATE, "param_groups": [{"params": [1, 0]}]}, "it has state of the shape [2] where 0.weight [2, 2]"),
        ({"state": {}, "param_groups": [{"params": [0, 1, 2]}]}, "it has 3 parameters, the model has 2"),
        (
            {"state": STATE, "param_groups": [{"params": [0, 1], "param_names": ["0.weight"]}]},
            "param_groups[0] has not one of its param_names for each of its params",
        ),
        (
            {"state": STATE, "param_groups": [{"params": [0, 1], "param_names": ["x", "y"]}]},
            "x, y in it are no parameter of the model",
        ),
        ({"state": {}, "param_groups": [{"params": list(range(10**6))}]}, "it has 1,000,000 parameters, the model has"),
        ({"state": {0: 5, 1: [torch.ones(2)]}, "param_groups": [GROUP]}, None),
        ({"state": {}, "param_groups": []}, None),
    ],
)
def test_what_is_no_optimizer_stays_as_it_was(cli: Cli, optimizer: Any, told: str | None) -> None:
    torch.save({"model": nn.Sequential(nn.Linear(2, 2)).state_dict(), "optimizer": optimizer}, "train.pth")
    notes = cli("init", "0.bias", "zeros", "-m", "train.pth", "-o", "out.pth").err
    assert ("as it was" in notes) == (told is not None)
    if told is not None:
        assert f"the state in optimizer is as it was and may not fit: {told}" in notes
        written = torch.load("out.pth", weights_only=True)["optimizer"]
        assert repr(written) == repr(optimizer)


def test_an_optimizer_that_is_there_twice_follows_in_both_places(cli: Cli) -> None:
    model = nets.Chain()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9).state_dict()
    torch.save({"model": model.state_dict(), "optimizer": optimizer, "all": [{"again": (optimizer,)}]}, "train.pth")
    cli("remove", "norm", "-m", "train.pth", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    assert written["optimizer"]["param_groups"][0]["params"] == list(range(12))
    assert written["all"][0]["again"][0]["param_groups"][0]["params"] == list(range(12))


def test_a_parameter_that_was_frozen_comes_back_without_state(cli: Cli) -> None:
    """The flags that an edit states count, also where the constructor's flag says the same already."""
    model = nets.Chain()
    saved(model, torch.optim.Adam(model.parameters()))
    cli("freeze", "stem", "norm", "-m", "train.pth", "-o", "frozen.pth")
    for number, arch in enumerate(((), ("--arch", "nets.py:Chain"), ("--bare-keys",))):
        notes = cli("unfreeze", "stem.bias", "-m", "frozen.pth", *arch, "-o", f"{number}.pth").err
        assert "the state in optimizer follows the edits; stem.bias is new in it, without state" in notes
        written = torch.load(f"{number}.pth", weights_only=True)["optimizer"]
        assert written["param_groups"][0]["params"] == list(range(11))
        assert written["state"].keys() == set(range(1, 11))


def test_only_a_record_tells_frozen_parameters_from_others_of_their_shape(cli: Cli) -> None:
    model = nets.Chain()
    saved(model, torch.optim.Adam(model.parameters()))
    cli("freeze", "layers", "-m", "train.pth", "-o", "frozen.pth")
    cli("unfreeze", "layers.2.bias", "-m", "frozen.pth", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)["optimizer"]
    assert written["state"].keys() == {0, 1, 2, 3, 5, 6}
    words = ("unfreeze", "layers.2.bias", "-m", "frozen.pth", "--bare-keys", "-o", "keys.pth")
    assert "is as it was and may not fit: it has 6 parameters, the model has 14" in cli(*words).err
