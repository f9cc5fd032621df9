"""`--also-ema`: other state dicts of the same model in a training checkpoint get the same edits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modelcli
from modelcli.errors import RequestError
from tests import nets
from tests.conftest import Cli

State = dict[str, Tensor]


def averaged(model: nn.Module) -> Any:
    """Return the state of torch's own moving average, with `n_averaged` and a prefix."""
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    return average.state_dict()


def moved(model: nn.Module) -> State:
    return OrderedDict((name, value + 1) for name, value in model.state_dict().items())


#: How a program has a moving average in its checkpoint, and what its keys have in front of the model's.
KINDS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "timm": (moved, ""),
    "plain dict": (lambda model: dict(moved(model)), ""),
    "AveragedModel": (averaged, "module."),
    "parameters": (lambda model: {name: p.detach() + 1 for name, p in model.named_parameters()}, ""),
}


@pytest.mark.parametrize("arch", [(), ("--arch", "nets.py:Chain")], ids=["keys", "arch"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_has_the_edits_made_by_hand(cli: Cli, kind: str, arch: tuple[str, ...]) -> None:
    make, prefix = KINDS[kind]
    model = nets.Chain()
    average = make(model)
    torch.save({"model": model.state_dict(), "state_dict_ema": average, "step": 3}, "train.pth")
    lines = ("-e", "replace head Linear(6,2)", "-e", "slice layers 3,1", "-e", "rename norm.** normal.**")
    lines = lines[:4] if arch else lines
    notes = cli("apply", *lines, "-m", "train.pth", *arch, "--check", "none", "--also-ema", "-o", "out.pth").err
    assert "the state dict in state_dict_ema has the same edits" in notes
    written = torch.load("out.pth", weights_only=True)
    found, edited = written["state_dict_ema"], written["model"]
    wanted = {prefix + name: value for name, value in edited.items()}
    if kind == "AveragedModel":
        wanted = {"n_averaged": average["n_averaged"]} | wanted
    if kind == "parameters":
        wanted = {name: value for name, value in wanted.items() if "running" not in name and "num_b" not in name}
    assert list(found) == list(wanted)
    for name, value in found.items():
        own = name.removeprefix(prefix)
        old = own.replace("layers.0", "layers.3").replace("normal.", "norm.")
        truth = edited[own] if own.startswith("head") else average[prefix + old if own != "n_averaged" else own]
        assert torch.equal(value, truth)
    assert type(found) is type(average)


@pytest.mark.parametrize("arch", [(), ("--arch", "nets.py:Chain")], ids=["keys", "arch"])
def test_the_metadata_of_an_average_moves_with_its_modules(cli: Cli, arch: tuple[str, ...]) -> None:
    model = nets.Chain()
    torch.save({"model": model.state_dict(), "ema": averaged(model)}, "train.pth")
    cli("slice", "layers", "0-1", "-m", "train.pth", *arch, "--also-ema", "-o", "out.pth")
    found = torch.load("out.pth", weights_only=True)["ema"]
    model.layers = model.layers[:2]
    truth = averaged(model)
    assert list(found) == list(truth)
    assert dict(found._metadata) == dict(truth._metadata)
    torch.optim.swa_utils.AveragedModel(model).load_state_dict(found)


def test_an_average_without_a_prefix_of_the_model(cli: Cli) -> None:
    model = nets.Chain()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "ema": dict(moved(model))}, "train.pth")
    cli("remove", "module.norm", "-m", "train.pth", "--also-ema", "--check", "none", "-o", "out.pth")
    found = torch.load("out.pth", weights_only=True)["ema"]
    assert list(found) == [name for name in model.state_dict() if not name.startswith("norm")]


def test_an_average_that_is_the_same_object(cli: Cli) -> None:
    state = nets.Chain().state_dict()
    torch.save({"model": state, "ema": state}, "train.pth")
    cli("split", "stem.weight", "a", "b", "-m", "train.pth", "--also-ema", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    assert list(written["ema"]) == list(written["model"])
    assert torch.equal(written["ema"]["a"], state["stem.weight"][:3])


def test_an_average_in_another_dtype_than_a_recorded_model(cli: Cli) -> None:
    """The record of the edited file names the architecture, and the average follows it as well."""
    model = nets.Chain()
    torch.save({"model": model.state_dict(), "ema": moved(model)}, "train.pth")
    cli("cast", ".", "bfloat16", "-m", "train.pth", "--arch", "nets.py:Chain", "-o", "half.pth")
    words = ("-m", "half.pth", "--trust", "--also-ema", "--check", "none", "-o", "out.pth")
    cli("slice", "layers", "2", *words)
    written = torch.load("out.pth", weights_only=True)
    assert {value.dtype for value in written["model"].values() if value.is_floating_point()} == {torch.bfloat16}
    assert torch.equal(written["ema"]["layers.0.bias"], model.state_dict()["layers.2.bias"] + 1)


def test_without_the_option_a_note_says_so(cli: Cli) -> None:
    model = nets.Chain()
    torch.save({"model": model.state_dict(), "ema": moved(model)}, "train.pth")
    notes = cli("remove", "norm", "-m", "train.pth", "--check", "none", "-o", "out.pth").err
    assert "the state dict in ema is unchanged and no longer fits" in notes
    assert "--key ema edits it, --also-ema edits both" in notes


@pytest.mark.parametrize("words", [("apply", "-e", "remove norm"), ("remove", "norm")])
def test_the_option_works_for_each_command(cli: Cli, words: tuple[str, ...]) -> None:
    model = nets.Chain()
    torch.save({"model": model.state_dict(), "ema": moved(model)}, "train.pth")
    cli(*words, "-m", "train.pth", "--check", "none", "--also-ema", "-o", "out.pth")
    assert "norm.weight" not in torch.load("out.pth", weights_only=True)["ema"]


def test_a_recipe_is_saved_with_the_option(cli: Cli) -> None:
    model = nets.Chain()
    torch.save({"model": model.state_dict(), "ema": moved(model)}, "train.pth")
    cli("load", "train.pth", "--arch", "nets.py:Chain")
    cli("replace", "head", "Linear(6,2)")
    cli("save", "out.pth", "--also-ema")
    assert torch.load("out.pth", weights_only=True)["ema"]["head.weight"].shape == (2, 6)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("-m", "train.pth", "-o", "out.pth"),
            "contains no other state dict with the keys and shapes of model",
        ),
        (("-m", "plain.pth", "-o", "out.pth"), "plain.pth is no training checkpoint, so there is no copy of the model"),
        (("-m", "ema.pth", "-o", "out.pth", "--bare"), "leave --also-ema out or --bare"),
        (("-m", "ema.pth", "-o", "out.safetensors"), "leave --also-ema out, or write a .pth file"),
    ],
)
def test_what_has_no_copy_to_edit_is_refused(cli: Cli, words: tuple[str, ...], told: str) -> None:
    model = nets.Chain()
    torch.save(model.state_dict(), "plain.pth")
    torch.save({"model": model.state_dict(), "ema": moved(model)}, "ema.pth")
    other = {name: torch.zeros(3) for name in model.state_dict()}
    torch.save({"model": model.state_dict(), "ema": other}, "train.pth")
    assert told in cli("freeze", "stem", *words, "--also-ema", code=2).err


def test_the_optimizer_of_a_model_does_not_follow_its_average(cli: Cli) -> None:
    model = nets.Chain()
    optimizer = torch.optim.SGD(model.parameters()).state_dict()
    torch.save({"model": model.state_dict(), "ema": moved(model), "optimizer": optimizer}, "train.pth")
    words = ("remove", "norm", "--key", "ema", "-m", "train.pth", "--check", "none")
    notes = cli(*words, "-o", "out.pth").err
    assert "optimizer is as before: that is for the parameters of model" in notes
    assert torch.load("out.pth", weights_only=True)["optimizer"] == optimizer
    cli(*words, "--also-ema", "-o", "both.pth")
    written = torch.load("both.pth", weights_only=True)
    assert list(written["model"]) == list(written["ema"])
    assert written["optimizer"]["param_groups"][0]["params"] == list(range(12))


def test_an_average_in_python_gets_the_same_edits() -> None:
    model = nets.Chain()
    average = torch.optim.swa_utils.AveragedModel(model)
    plain = nets.Chain()
    edits = ("replace head Linear(6,2)", "slice layers 3,1")
    last = plain.layers[3].weight
    modelcli.apply(model, *edits, also_ema=average)
    assert torch.equal(average.module.head.weight, model.head.weight)
    assert average.module.head.weight is not model.head.weight
    assert list(average.module.state_dict()) == list(model.state_dict())
    modelcli.apply(nets.Chain(), *edits, also_ema=plain)
    assert plain.layers[0].weight is last
    assert modelcli.apply(model, "extract layers", also_ema=average) is not model
    assert isinstance(average.module, nn.Sequential)


def test_a_wrong_average_in_python_changes_nothing() -> None:
    model, plain = nets.Chain(), nets.Chain()
    before = list(model.state_dict())
    with pytest.raises(RequestError, match="has other tensors than the model"):
        modelcli.apply(model, "remove norm", also_ema=nets.Net())
    with pytest.raises(RequestError, match="cannot become it"):
        modelcli.apply(model, "remove norm", "extract layers", also_ema=plain)
    assert list(model.state_dict()) == list(plain.state_dict()) == before
