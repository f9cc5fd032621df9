"""If it is unknown whether a parameter is trainable, the value is None, `null` or `-`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelcli
from modelcli.model.tensors import TensorInfo
from modelcli.model.totals import Totals, totals_of
from tests.conftest import Cli

PARAMS = 4 * 3 + 4 + 4 + 4 + 2 * 4 + 2


@pytest.fixture
def _old(folder: Path) -> None:
    """Save a model with a frozen first layer as a training script does, so that requires_grad is not stored."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    torch.save(model.state_dict(), "old.pth")
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, "train.ckpt")
    save_file(model.state_dict(), "old.safetensors")
    torch.save(dict(model.named_parameters()), "parameters.pth")  # Parameter objects store requires_grad


def flags(cli: Cli, name: str) -> dict[str, Any]:
    return {row["name"]: row["trainable"] for row in cli("params", name, "--json").json["tensors"]}


@pytest.mark.usefixtures("_old")
@pytest.mark.parametrize("name", ["old.pth", "old.safetensors", "train.ckpt"])
def test_summary_params_and_modules_say_null(cli: Cli, name: str) -> None:
    summary, params, modules = (cli(word, name, "--json").json for word in ("summary", "params", "modules"))
    assert {row["trainable"] for row in summary["layers"]} == {None}
    assert {row["trainable"] for row in modules["modules"]} == {None}
    assert {row["trainable"] for row in params["tensors"]} == {None}
    for document in (summary, params, modules):
        totals = document["totals"]
        assert (totals["params"], totals["trainable_params"], totals["non_trainable_params"]) == (PARAMS, None, None)
    assert modelcli.blueprint(name).totals.trainable_params is None
    assert modelcli.blueprint(name).totals.non_trainable_params is None
    assert modelcli.blueprint(name).trainable_of("0") is None


@pytest.mark.usefixtures("_old")
def test_tables_show_a_dash(cli: Cli) -> None:
    lines = cli("summary", "old.pth").out.splitlines()
    assert [line.split()[-2] for line in lines[1:5]] == ["-"] * 4
    footer = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    assert (footer["Trainable params"], footer["Non-trainable params"]) == ("-", "-")
    assert "trainable)" not in cli("params", "old.pth").out


@pytest.mark.usefixtures("_old")
def test_saved_parameters_keep_their_requires_grad(cli: Cli) -> None:
    found = flags(cli, "parameters.pth")
    assert (found["0.weight"], found["2.weight"]) == (False, True)
    assert cli("summary", "parameters.pth", "--json").json["totals"]["trainable_params"] == PARAMS - 16
    cli("save", "copy.pth", "-m", "parameters.pth")
    assert flags(cli, "copy.pth") == found


@pytest.mark.usefixtures("_old")
@pytest.mark.parametrize("out", ["out.pth", "out.safetensors", "out/"])
@pytest.mark.parametrize(
    ("words", "known"),
    [
        (("save", "OUT"), ()),
        (("rename", "2.*", "head.*", "-o", "OUT"), ()),
        (("cast", "0", "bfloat16", "-o", "OUT"), ()),
        (("init", "0", "zeros", "-o", "OUT"), ()),
        (("extract", "0", "-o", "OUT"), ()),
        (("remove", "1", "-o", "OUT"), ()),
        (("replace", "2", "Linear(4,5)", "-o", "OUT"), (("2.weight", True), ("2.bias", True))),
        (("add", "extra", "Linear(2,2)", "-o", "OUT"), (("extra.weight", True), ("extra.bias", True))),
        (("freeze", "0", "-o", "OUT"), (("0.weight", False), ("0.bias", False))),
        (("unfreeze", "2.bias", "-o", "OUT"), (("2.bias", True),)),
    ],
    ids=lambda value: value[0] if isinstance(value[0] if value else None, str) else "",
)
def test_writing_a_file_again_does_not_make_the_flags_known(
    cli: Cli, out: str, words: tuple[str, ...], known: tuple[tuple[str, bool], ...]
) -> None:
    """Only what an edit creates, freezes or unfreezes is known, also when the record of the result is read again."""
    cli(*(out if word == "OUT" else word for word in words), "-m", "old.pth", "-q")
    cli("save", f"again-{out}", "-m", out, "-q")
    for name in (out, f"again-{out}"):
        found = flags(cli, name)
        assert {key: flag for key, flag in found.items() if flag is not None} == dict(known)
        assert cli("summary", name, "--json").json["totals"]["trainable_params"] is None
        cli("check", name, "--trainable", ".", code=1)
        cli("check", name, "--frozen", ".", code=1)


@pytest.mark.usefixtures("_old")
def test_a_check_says_that_nothing_is_known(cli: Cli) -> None:
    cli("freeze", "0", "-m", "old.pth", "-o", "out.pth", "-q")
    for option in ("--trainable", "--frozen"):
        (row,) = cli("check", "out.pth", option, "2", "--json", code=1).json["checks"]
        assert row["found"].startswith("modelcli does not know whether 2.weight, 2.bias are ")
    cli("check", "out.pth", "--frozen", "0")
    cli("check", "old.pth", "--arch", "Sequential(Linear(3,4),BatchNorm1d(4),Linear(4,2))", "--trainable", ".")


@pytest.mark.usefixtures("_old")
def test_freezing_everything_makes_everything_known(cli: Cli) -> None:
    done = cli("freeze", ".", "-m", "old.pth", "-o", "out.pth", "--json").json
    assert done["changes"][0]["before"] == "not known"
    assert (done["totals_before"]["trainable_params"], done["totals_after"]["trainable_params"]) == (None, 0)
    assert "trainable:   - -> 0\n" in cli("freeze", ".", "-m", "old.pth").out
    assert cli("summary", "out.pth", "--json").json["totals"]["non_trainable_params"] == PARAMS
    assert "changes nothing" in cli("freeze", ".", "-m", "out.pth").err
    assert "changes nothing" not in cli("unfreeze", ".", "-m", "old.pth").err


@pytest.mark.usefixtures("_old")
def test_unknown_flags_are_not_compared_and_filters_add_a_note(cli: Cli) -> None:
    cli("save", "known.pth", "-m", "old.pth", "--arch", "Sequential(Linear(3,4),BatchNorm1d(4),Linear(4,2))", "-q")
    assert "nothing says in old.pth which parameters are trained" in cli("diff", "old.pth", "known.pth").err
    result = cli("params", "old.pth", "--frozen")
    assert "modelcli does not know whether some parameters are trainable" in result.err


def test_a_failed_edit_leaves_the_flags_unknown(cli: Cli) -> None:
    from modelcli import edits
    from modelcli.commands.editable import open_editable
    from modelcli.errors import ModelcliError
    from modelcli.language.references import Source

    torch.save({"a.weight": torch.zeros(2, 2)}, "a.pth")
    live = open_editable(Source("a.pth"))
    with pytest.raises(ModelcliError):
        live.apply([edits.parse("freeze a"), edits.parse("remove nothing")])
    assert live.describe().by_name["a.weight"].requires_grad is None


def test_the_json_values_of_trainable(cli: Cli) -> None:
    """The values are true, false, "partial" and null, for modules and tensors alike."""
    cli("freeze", "0", "-m", "Sequential(Linear(2,2),ReLU(),Sequential(Linear(2,2)))", "-o", "out.pth", "-q")
    for word, rows in (("summary", "layers"), ("modules", "modules")):
        found = {row["path"]: row["trainable"] for row in cli(word, "out.pth", "--json").json[rows]}
        assert found == {".": "partial", "0": False, "1": None, "2": True, "2.0": True}
    lines = {line.split()[0]: line.split()[-1] for line in cli("modules", "out.pth").out.splitlines()[1:6]}
    assert lines == {".": "partial", "0": "no", "1": "-", "2": "yes", "2.0": "yes"}


def test_totals_of_integer_parameters_are_known() -> None:
    whole = TensorInfo("w", (3,), "int8")
    assert totals_of([whole]) == Totals(3, 0, 0, 3, 0)
    assert totals_of([whole, TensorInfo("x", (2,), "float32")]) == Totals(5, None, 0, 11, 0)
