"""`check A B C` and its annotations for GitHub: rows for each model, the worst exit code, and escaped names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modelcli.render.annotations import command
from tests.conftest import Cli


@pytest.fixture
def _files(folder: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 3)}, "good.pth")
    torch.save({"fc.weight": torch.full((2, 3), float("nan"))}, "nan.pth")
    (folder / "damaged.pth").write_bytes(b"PK\x03\x04 and then nothing")


@pytest.mark.usefixtures("_files")
def test_each_row_names_its_model(cli: Cli) -> None:
    result = cli("check", "good.pth", "nan.pth", "--finite", "--max-params", "6", code=1)
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0] == ["model", "check", "result", "found", "wanted"]
    assert [line[:3] for line in lines[1:5]] == [
        ["nan.pth", "finite", "FAILED"],
        ["good.pth", "max-params", "passed"],
        ["good.pth", "finite", "passed"],
        ["nan.pth", "max-params", "passed"],
    ]
    assert result.out.splitlines()[-1] == "Checks: 3 of 4 passed"


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize(
    ("models", "code"),
    [
        (("good.pth", "good.pth"), 0),
        (("good.pth", "nan.pth"), 1),
        (("none.pth", "nan.pth", "good.pth"), 2),
        (("damaged.pth", "nan.pth", "none.pth", "good.pth"), 4),
    ],
)
def test_the_exit_code_is_the_worst(cli: Cli, models: tuple[str, ...], code: int) -> None:
    """A model that cannot be opened does not prevent the others from being checked."""
    document = cli("check", *models, "--finite", "--json", code=code).json
    assert [each["model"]["reference"] for each in document["models"]] == list(models)
    assert document["passed"] is (code == 0)
    for each in document["models"]:
        name = each["model"]["reference"]
        assert each["passed"] is (name == "good.pth")
        assert ("error" in each) is (name in ("none.pth", "damaged.pth"))
        assert [row["check"] for row in each["checks"]] == ([] if "error" in each else ["finite"])
    table = cli("check", *models, "--finite", code=code).out
    assert ("no such file: none.pth" in table) is ("none.pth" in models)


@pytest.mark.usefixtures("_files")
def test_an_invalid_request_is_reported_once(cli: Cli) -> None:
    assert "no assertion is given" in cli("check", "good.pth", "nan.pth", code=2).err
    assert "two models" in cli("check", "good.pth", "nan.pth", "-m", "good.pth", "--finite", code=2).err
    assert "unknown format 'github'" in cli("params", "good.pth", "-f", "github", code=2).err
    assert "two formats" in cli("check", "good.pth", "--finite", "-f", "github", "--json", code=2).err


@pytest.mark.usefixtures("_files")
def test_annotations_for_github(cli: Cli) -> None:
    result = cli("check", "good.pth", "nan.pth", "none.pth", "--finite", "-f", "github", code=2)
    assert result.err == ""
    assert result.out.splitlines() == [
        "::error file=nan.pth,title=modelcli check --finite::nan.pth: fc.weight: 6 NaN; wanted: no NaN, no Inf",
        "::error title=modelcli check::no such file: none.pth",
        *[line for line in result.out.splitlines() if line.startswith("::notice title=modelcli check::none.pth: ")],
        "Checks: 1 of 3 passed",
    ]
    assert cli("check", "good.pth", "--finite", "--format", "github").out == "Checks: 1 of 1 passed\n"


def test_names_in_a_file_are_not_read_as_workflow_commands(cli: Cli) -> None:
    """GitHub obeys each line that starts with two colons, so a name with a newline must not start such a line."""
    evil = "a\r\n::set-output name=x::100%,b:c"
    torch.save({evil: torch.tensor([float("nan")])}, "evil,100%.pth")
    lines = cli("check", "evil,100%.pth", "--finite", "-f", "github", code=1).out.splitlines()
    (error,) = [line for line in lines if line.startswith("::")]
    assert error.startswith(
        "::error file=evil%2C100%25.pth,title=modelcli check --finite::evil,100%25.pth: a%0D%0A::set"
    )
    assert "name=x::100%25,b:c" in error
    assert len(lines) == 2
    assert command("notice", "50%\r\n", {"file": "a:b,c%\n"}) == "::notice file=a%3Ab%2Cc%25%0A::50%25%0D%0A"
