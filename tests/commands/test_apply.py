"""`apply` carries out many edits in one process: all of them or none."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import nets
from tests.conftest import Cli

RECIPE = """\
# what we do to every network
model = "nets.py:Net"
seed = 3
edits = [
    "replace conv2 Conv2d(_,7,1)",
    "freeze conv1",  # for now
]
"""


@pytest.fixture
def recipe(folder: Path) -> Path:
    path = folder / "head.toml"
    path.write_text(RECIPE)
    return path


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make standard input return this text."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"nets.py", "__pycache__"}


def same(path: str, plain: nn.Module) -> bool:
    state = torch.load(path, weights_only=True)
    expected = plain.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


# --- what is applied to what ---------------------------------------------------------------------------------------


def test_a_recipe_equals_plain_pytorch_statements(cli: Cli, recipe: Path) -> None:
    result = cli("apply", "head.toml", "-o", "out.pth", "--json").json
    torch.manual_seed(3)
    plain = nets.Net()
    torch.manual_seed(3 * 1_000_003 + 1)
    plain.conv2 = nn.Conv2d(3, 7, 1)
    assert same("out.pth", plain)
    assert result["edits"] == ["replace conv2 Conv2d(_,7,1)", "freeze conv1"]
    assert [row["path"] for row in result["changes"]] == ["conv2", "conv1"]
    assert result["totals_before"]["params"] == 27
    assert result["totals_after"]["params"] == sum(p.numel() for p in plain.parameters())
    assert result["totals_after"]["trainable_params"] == result["totals_after"]["params"] - 6
    assert recipe.read_text() == RECIPE


def test_the_same_as_load_edits_and_save(cli: Cli, recipe: Path) -> None:
    cli("apply", "head.toml", "-o", "at_once.pth")
    cli("load", "nets.py:Net", "--seed", "3")
    cli("replace", "conv2", "Conv2d(_,7,1)")
    cli("freeze", "conv1")
    cli("save", "one_by_one.pth")
    assert Path("at_once.pth").read_bytes() == Path("one_by_one.pth").read_bytes()


def test_another_model_than_the_recipes(cli: Cli, folder: Path) -> None:
    """The weights, inputs and other options of the recipe's own model do not apply to another model; the seed does."""
    torch.manual_seed(1)
    mine = nets.Net()
    torch.save(mine.state_dict(), "mine.pth")
    (folder / "head.toml").write_text(RECIPE + 'weights = "elsewhere.pth"\n')
    cli("apply", "head.toml", "-m", "mine.pth", "--arch", "nets.py:Net", "-o", "out.pth")
    torch.manual_seed(3 * 1_000_003 + 1)
    mine.conv2 = nn.Conv2d(3, 7, 1)
    assert same("out.pth", mine)


def test_a_recipe_in_another_folder(cli: Cli, folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "r.toml").write_text('model = "../nets.py:Net"\nedits = ["freeze bn"]\n')
    cli("apply", "recipes/r.toml", "-o", "out.pth")
    frozen = cli("params", "out.pth", "--frozen", "--json").json["tensors"]
    assert [row["name"] for row in frozen] == ["bn.weight", "bn.bias"]


def test_lines_on_the_command_line(cli: Cli, folder: Path) -> None:
    lines = ["-e", "freeze .", "-e", "unfreeze bn", "-e", "freeze bn.bias"]
    result = cli("apply", *lines, "-m", "nets.py:Net", "-o", "out.pth", "--json").json
    assert result["edits"] == ["freeze .", "unfreeze bn", "freeze bn.bias"]
    rows = cli("params", "out.pth", "--trainable", "--json").json["tensors"]
    assert [row["name"] for row in rows] == ["bn.weight"]
    assert files(folder) == {"out.pth"}


def test_lines_after_those_of_a_recipe(cli: Cli, recipe: Path) -> None:
    result = cli("apply", "head.toml", "-e", "unfreeze conv1", "--json").json
    assert result["edits"] == ["replace conv2 Conv2d(_,7,1)", "freeze conv1", "unfreeze conv1"]
    assert result["totals_after"]["non_trainable_params"] == 0
    assert recipe.read_text() == RECIPE


def test_standard_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "\ufeff# the backbone\r\n\r\n  freeze conv1\n\t# and\nfreeze bn")
    result = cli("apply", "-", "-e", "unfreeze bn.bias", "-m", "nets.py:Net", "--json").json
    assert result["edits"] == ["freeze conv1", "freeze bn", "unfreeze bn.bias"]


def test_lines_join_the_working_recipe(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("load", "nets.py:Net")
    cli("freeze", "conv1")
    cli("apply", "-e", "replace conv2 ReLU", "-e", "freeze bn")
    typed(monkeypatch, "unfreeze bn\n")
    result = cli("apply", "-", "--json").json
    assert [row["path"] for row in result["changes"]] == ["bn"]  # earlier edits are not shown again
    assert cli("log", "--json").json["edits"] == ["freeze conv1", "replace conv2 ReLU()", "freeze bn", "unfreeze bn"]


def test_without_anything_it_is_the_working_recipe(cli: Cli, folder: Path) -> None:
    cli("load", "nets.py:Net")
    cli("freeze", "conv1")
    before = (folder / "modelcli.toml").read_text()
    cli("apply", "-o", "out.pth")
    cli("save", "saved.pth")
    assert (folder / "out.pth").read_bytes() == (folder / "saved.pth").read_bytes()
    assert (folder / "modelcli.toml").read_text() == before


def test_nothing_is_written_without_out(cli: Cli, recipe: Path, folder: Path) -> None:
    result = cli("apply", "head.toml")
    assert "not written" in result.out
    cli("apply", "head.toml", "-o", "out.pth", "--dry-run")
    assert files(folder) == {"head.toml"}


def test_an_existing_file_needs_force(cli: Cli, recipe: Path, folder: Path) -> None:
    (folder / "out.pth").write_bytes(b"mine")
    cli("apply", "head.toml", "-o", "out.pth", code=2)
    assert (folder / "out.pth").read_bytes() == b"mine"
    cli("apply", "head.toml", "-o", "out.pth", "--force")
    assert torch.load("out.pth", weights_only=True)["conv2.weight"].shape == (7, 3, 1, 1)


# --- all or nothing ------------------------------------------------------------------------------------------------


def test_the_edit_that_is_wrong_is_named(cli: Cli, folder: Path) -> None:
    (folder / "head.toml").write_text(RECIPE.replace("freeze conv1", "freeze conv9"))
    error = cli("apply", "head.toml", "-o", "out.pth", "--json", code=2).error
    assert error["message"] == "head.toml:6: 'freeze conv9': no tensor matches 'conv9'"
    assert "nearest: conv1" in error["hint"] or "nearest: conv2" in error["hint"]
    assert files(folder) == {"head.toml"}


def test_the_fifth_line_is_wrong_and_the_working_recipe_stays(cli: Cli, folder: Path) -> None:
    cli("load", "nets.py:Net")
    before = (folder / "modelcli.toml").read_bytes()
    lines = ["freeze conv1", "freeze bn", "unfreeze bn", "replace conv2 ReLU", "freeze conv2"]
    words = [word for line in lines for word in ("-e", line)]
    error = cli("apply", *words, "-o", "out.pth", "--json", code=2).error
    assert error["message"].startswith("-e 5: 'freeze conv2': nothing to freeze")
    assert (folder / "modelcli.toml").read_bytes() == before
    assert files(folder) == {"modelcli.toml"}


def test_all_edits_that_fail_are_reported_together(cli: Cli, folder: Path) -> None:
    (folder / "many.toml").write_text(
        'model = "nets.py:Net"\nedits = [\n    "freeze conv9",\n    "freeze bn",\n    "replace conv2 Linaer(3,5)",\n]\n'
    )
    error = cli("apply", "many.toml", "-o", "out.pth", "--json", code=2).error
    first, second = error["message"].splitlines()
    assert first.startswith("many.toml:3: 'freeze conv9': no tensor matches 'conv9' (nearest: conv")
    assert second.startswith("many.toml:5: 'replace conv2 Linaer(3,5)': conv2: no class 'Linaer'")
    assert "did you mean Linear" in second
    assert error["hint"] == "correct the first error first: it may cause the others"
    assert files(folder) == {"many.toml"}


def test_a_line_that_a_recipe_cannot_store_writes_nothing(cli: Cli, folder: Path) -> None:
    cli("load", "nets.py:Net")
    (folder / "out.pth").write_bytes(b"mine")
    before = (folder / "modelcli.toml").read_bytes()
    error = cli("apply", "-e", "add '\udcff' ReLU", "-o", "out.pth", "--force", "--json", code=2).error
    assert error["message"] == "cannot write modelcli.toml: a recipe is UTF-8 text, but a name in it is not"
    assert (folder / "modelcli.toml").read_bytes() == before
    assert (folder / "out.pth").read_bytes() == b"mine"


def test_a_result_that_does_not_run_is_not_recorded(cli: Cli, folder: Path) -> None:
    cli("load", "nets.py:Net", "--input-size", "1,1,4,4")
    before = (folder / "modelcli.toml").read_bytes()
    error = cli("apply", "-e", "freeze bn", "-e", "replace conv2 Conv2d(9,5,1)", "--json", code=2).error
    assert "conv2" in error["message"]
    assert (folder / "modelcli.toml").read_bytes() == before
    cli("apply", "-e", "freeze bn", "-e", "replace conv2 Conv2d(9,5,1)", "--check", "none")
    assert b"Conv2d(9,5,1)" in (folder / "modelcli.toml").read_bytes()


def test_the_error_names_the_edits_that_break_the_fit(cli: Cli, folder: Path) -> None:
    lines = ["replace fc Linear(11,5)", "freeze layer1", "replace fc Linear(_,3)", "freeze ."]
    error = cli("apply", "-m", "resnet18", *(w for line in lines for w in ("-e", line)), "--json", code=2).error
    assert error["message"].startswith(
        "-e 1: 'replace fc Linear(11,5)', -e 3: 'replace fc Linear(_,3)': fc Linear(11, 3) does not fit: [1,512]"
    )
    assert error["hint"] == "replace fc 'Linear(512,3)'"
    (folder / "wide.toml").write_text(
        'model = "alexnet"\nedits = [\n    "freeze .",\n    "replace classifier.4 Linear(4096,9)",\n]\n'
    )
    for command in (["apply", "wide.toml"], ["save", "out.pth", "--recipe", "wide.toml"]):
        error = cli(*command, "--json", code=2).error
        assert error["message"].startswith(
            "wide.toml:4: 'replace classifier.4 Linear(4096,9)': classifier.6 Linear(4096, 1000) does not fit"
        )
        assert "keep the former output size of classifier.4" in error["hint"]
    error = cli("replace", "classifier.6", "Linear(9,5)", "-m", "alexnet", "--json", code=2).error
    assert error["message"].startswith("classifier.6 Linear(9, 5) does not fit")


def test_all_bad_lines_are_reported_at_once(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines are checked before the model is opened: this model does not exist."""
    typed(monkeypatch, "frezee a\n# a comment\nfreeze a\nreplace b Linear(\n")
    error = cli("apply", "-", "-e", "freeze", "-m", "missing.pth", "--json", code=2).error
    lines = error["message"].splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["standard input:1", "standard input:4", "-e 1"]
    assert lines[0] == "standard input:1: no such edit: 'frezee' (did you mean freeze, unfreeze or resize?)"


def test_bad_lines_of_a_recipe_and_after_it(cli: Cli, folder: Path) -> None:
    (folder / "head.toml").write_text('model = "missing.pth"\nsed = 1\nedits = ["frezee a", "freeze b{"]\n')
    message = cli("apply", "head.toml", "-e", "freeze", "--json", code=2).error["message"]
    assert [line.partition(": ")[0] for line in message.splitlines()] == [
        "head.toml:2", "head.toml:3", "head.toml:3", "-e 1"
    ]  # fmt: skip


def test_missing_arguments_are_errors(cli: Cli, recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = cli("apply", "heda.toml", "--json", code=2).error
    assert error["message"] == "no such file: heda.toml"
    assert "head.toml" in error["hint"]
    assert "no model is given" in cli("apply", code=2).err
    assert "no model is given" in cli("apply", "-e", "freeze a", code=2).err
    assert "two recipes" in cli("apply", "head.toml", "--recipe", "head.toml", code=2).err
    (folder / "empty.toml").write_text('model = "alexnet"\n')
    assert "empty.toml has no edits to apply" in cli("apply", "empty.toml", code=2).err
    typed(monkeypatch, "# nothing\n")
    assert "no edits on standard input" in cli("apply", "-", "-m", "alexnet", code=2).err


def test_no_edits_at_all(cli: Cli) -> None:
    error = cli("apply", "-m", "nets.py:Net", code=2).err
    assert "no edits are given" in error
    assert "pass -e EDIT, the path of a recipe, or - to read edits from standard input" in error


def test_messages_name_a_recipe_that_is_not_the_working_recipe(cli: Cli) -> None:
    cli("load", "nets.py:Net", "--recipe", "my.toml")
    assert "(modelcli save OUT --recipe my.toml writes the result)" in cli("freeze", "bn", "--recipe", "my.toml").out
