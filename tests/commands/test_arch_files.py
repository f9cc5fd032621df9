"""`--arch head.pth` and `--arch modelcli.toml`: the architecture of a checkpoint comes from a record or a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import modelcli
from modelcli import checkpoints
from modelcli.errors import RequestError
from tests.conftest import Cli

BASE = "Sequential(Linear(3,4),ReLU(),Linear(4,2))"
EDITS = ("-e", "replace 2 Linear(_,5)", "-e", "freeze 0")


@pytest.fixture
def _trained(cli: Cli) -> None:
    """Write `head.pth` with modelcli, and `trained.pth` as a training script saves it, without the record."""
    cli("apply", "-m", BASE, *EDITS, "-o", "head.pth", "--input-size", "1,3", "-q")
    model = modelcli.load("head.pth")
    with torch.no_grad():
        model[2].weight.fill_(7)  # type: ignore[index, union-attr, operator]
    torch.save(dict(model.state_dict()), "trained.pth")


@pytest.mark.usefixtures("_trained")
def test_the_record_of_a_file_is_the_architecture_of_another(cli: Cli) -> None:
    cli("save", "out.pth", "-m", "trained.pth", "--arch", "head.pth", "-q")
    record, before = (checkpoints.read(Path(name)).record for name in ("out.pth", "head.pth"))
    assert record is not None
    assert before is not None
    assert (record.reference, record.edits, record.frozen) == (before.reference, before.edits, before.frozen)
    assert (record.seed, record.numbers, record.edit_count) == (before.seed, before.numbers, before.edit_count)
    model = modelcli.load("out.pth")
    assert (model[2].weight == 7).all()  # type: ignore[index, union-attr, operator]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert cli("check", "trained.pth", "--arch", "head.pth", "--output-shape", "1,5", "--frozen", "0").code == 0
    loaded = modelcli.load("trained.pth", arch="head.pth")
    assert [p.requires_grad for p in loaded.parameters()] == [False, False, True, True]
    assert type(loaded) is nn.Sequential
    cli("replace", "2", "Linear(_,9)", "-m", "trained.pth", "--arch", "head.pth", "-o", "nine.pth", "-q")
    assert modelcli.load("nine.pth")[2].out_features == 9  # type: ignore[index, union-attr]


@pytest.mark.usefixtures("_trained")
def test_a_recipe_is_the_architecture_of_a_file(cli: Cli, folder: Path) -> None:
    (folder / "work").mkdir()
    recipe = folder / "work" / "head.toml"
    recipe.write_text(f'model = "{BASE}"\nseed = 3\nedits = ["replace 2 Linear(_,5)", "freeze nothing"]\n')
    assert "work/head.toml:3: " in cli("save", "x.pth", "-m", "trained.pth", "--arch", recipe, code=2).err
    recipe.write_text(f'model = "{BASE}"\nseed = 3\nedits = ["replace 2 Linear(_,5)", "freeze 0"]\n')
    cli("save", "out.pth", "-m", "trained.pth", "--arch", "work/head.toml", "-q")
    record = checkpoints.read(Path("out.pth")).record
    assert record is not None
    assert record.edits == ("replace 2 Linear(4,5)", "freeze 0")
    assert (record.seed, record.frozen) == (3, ("0.weight", "0.bias"))
    assert (modelcli.load("out.pth")[2].weight == 7).all()  # type: ignore[index, union-attr, operator]


def test_python_code_in_a_recipe_is_trusted_and_in_a_file_needs_trust(cli: Cli, folder: Path) -> None:
    (folder / "runs").mkdir()
    (folder / "modelcli.toml").write_text('model = "nets.py:Net"\nedits = ["freeze conv1"]\n')
    cli("save", "runs/own.pth", "-q")
    torch.save(dict(torch.load("runs/own.pth", weights_only=True)), "plain.pth")
    cli("save", "runs/by_recipe.pth", "-m", "plain.pth", "--arch", "modelcli.toml", "-q")
    record = checkpoints.read(Path("runs/by_recipe.pth")).record
    assert record is not None
    assert record.reference == "../nets.py:Net"
    assert "--trust" in cli("save", "x.pth", "-m", "plain.pth", "--arch", "runs/own.pth", code=3).err
    cli("save", "x.pth", "-m", "plain.pth", "--arch", "runs/own.pth", "--trust", "-q")


@pytest.mark.usefixtures("_trained")
def test_a_file_without_an_architecture_is_an_error(cli: Cli, folder: Path) -> None:
    error = cli("save", "x.pth", "-m", "trained.pth", "--arch", "trained.pth", code=2).err
    assert "--arch trained.pth: that file records no architecture" in error
    (folder / "bare.toml").write_text('model = "trained.pth"\n')
    assert "names no architecture" in cli("save", "x.pth", "-m", "trained.pth", "--arch", "bare.toml", code=2).err
    assert "no such file: none.toml" in cli("save", "x.pth", "-m", "trained.pth", "--arch", "none.toml", code=2).err
    for name, other in (("one", "two"), ("two", "one"), ("same", "same")):
        (folder / f"{name}.toml").write_text(f'model = "trained.pth"\narch = "{other}.toml"\n')
    for name in ("one", "same"):
        error = cli("save", "x.pth", "-m", "trained.pth", "--arch", f"{name}.toml", code=2).err
        assert f"the architecture of {name}.toml is that of {name}.toml itself" in error
    torch.save(nn.Linear(2, 2).state_dict(), "other.pth")
    assert "does not fit" in cli("save", "x.pth", "-m", "other.pth", "--arch", "head.pth", code=1).err
    with pytest.raises(RequestError, match="records no architecture"):
        modelcli.load("trained.pth", arch="trained.pth")
