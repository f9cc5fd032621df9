"""How often an edit describes, builds and runs its model: two descriptions, one build, one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from modelcli.live import build, describe, trace
from modelcli.model import state_dict
from modelcli.model.blueprint import Blueprint
from tests.conftest import Cli

DESCRIBED, BUILT, RAN = "described", "built", "ran"


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count descriptions, builds of an architecture on the meta device, and forward passes."""
    counts: Counter[str] = Counter()

    def count(module: ModuleType, name: str, what: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    real_walk = describe.walk

    def walk(*args: Any) -> Any:
        counts[DESCRIBED] += len(args) == 1  # it calls itself with more arguments for submodules
        return real_walk(*args)

    monkeypatch.setattr(describe, "walk", walk)
    count(build, "build_on_meta", BUILT)
    count(trace, "Calls", RAN)
    return counts


@pytest.mark.parametrize("line", ["replace fc Linear(_,10)", "freeze layer1", "cast . bfloat16", "init fc zeros"])
def test_a_written_edit_describes_twice_builds_once_and_runs_once(cli: Cli, work: Counter[str], line: str) -> None:
    cli(*line.split(), "-m", "resnet18", "-o", "out.pth")
    assert (work[DESCRIBED], work[BUILT], work[RAN]) == (2, 1, 1)


#: Edits of each kind. All edits that place a new module use the same code for its position.
PLACING = ["add layer1.last ReLU()", "append layer1 ReLU()", "insert layer1.0 ReLU()", "replace fc Linear(_,10)"]


@pytest.mark.parametrize("line", [*PLACING, "remove layer4.1", "freeze layer1", "extract layer1"])
def test_an_edit_of_a_file_with_a_record_describes_twice_and_builds_once(
    cli: Cli, work: Counter[str], line: str
) -> None:
    """The model is described before and after. The record and the check add no description."""
    cli("save", "start.pth", "-m", "resnet18")
    work.clear()
    passes = 2 if line.startswith("extract") else 1  # the pass of the whole model finds the input of the extracted part
    cli(*line.split(), "-m", "start.pth", "-o", "out.pth")
    assert (work[DESCRIBED], work[BUILT], work[RAN]) == (2, 1, passes)


def test_each_recorded_edit_describes_its_input_once(cli: Cli, work: Counter[str]) -> None:
    cli("apply", "-e", "replace fc Linear(_,10)", "-e", "freeze layer1", "-m", "resnet18", "-o", "start.pth")
    work.clear()
    cli("append", "layer1", "ReLU()", "-m", "start.pth", "-o", "out.pth")
    assert (work[DESCRIBED], work[BUILT], work[RAN]) == (2 + 2, 1, 1)


def test_a_hole_filled_from_the_input_takes_one_more_pass(cli: Cli, work: Counter[str]) -> None:
    """One pass of the unedited model finds the value of `_`, and the check runs the edited model."""
    cli("insert", "layer1.0", "BatchNorm2d(_)", "-m", "resnet18", "-o", "out.pth")
    assert (work[DESCRIBED], work[BUILT], work[RAN]) == (2, 1, 2)


@pytest.mark.parametrize(
    "line", ["add head.new Linear(4,2)", "insert layers.1 ReLU() --renumber", "rename layers.** old.**"]
)
def test_an_edit_of_keys_describes_twice(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    state = {f"layers.{number}.weight": torch.zeros(2) for number in range(3)} | {"head.weight": torch.zeros(2)}
    torch.save(state, "bare.pth")
    made: list[Blueprint] = []

    def counted(*args: Any) -> Blueprint:
        made.append(Blueprint(*args))
        return made[-1]

    monkeypatch.setattr(state_dict, "Blueprint", counted)
    cli(*line.split(), "-m", "bare.pth", "-o", "out.pth")
    assert len(made) == 2


def test_an_edit_of_a_recipe_runs_once_for_the_check(cli: Cli, work: Counter[str]) -> None:
    cli("load", "resnet18")
    work.clear()
    cli("freeze", "layer1")
    assert (work[DESCRIBED], work[BUILT], work[RAN]) == (2, 1, 1)
    work.clear()
    cli("save", "out.pth")
    assert (work[DESCRIBED], work[BUILT], work[RAN]) == (2, 1, 1)


def test_the_unedited_model_is_opened_where_the_edited_one_fails_and_nowhere_else(cli: Cli, work: Counter[str]) -> None:
    result = cli("replace", "fc", "Linear(3,10)", "-m", "resnet18", "-o", "out.pth", code=2)
    assert "does not fit" in result.err
    assert (work[BUILT], work[RAN]) == (2, 2)


def test_the_pass_of_the_check_is_the_one_in_the_record(cli: Cli) -> None:
    """The rows and multiply-accumulates in the record come from the pass of the check."""
    cli("replace", "fc", "Linear(_,10)", "-m", "resnet18", "-o", "checked.pth")
    cli("replace", "fc", "Linear(_,10)", "-m", "resnet18", "--check", "none", "-o", "unchecked.pth")
    checked = cli("summary", "checked.pth", "--json").json
    unchecked = cli("summary", "unchecked.pth", "--json").json
    assert checked["totals"]["macs"] == unchecked["totals"]["macs"] > 10**9
    assert checked["layers"] == unchecked["layers"]


def test_several_edits_describe_once_more_each(cli: Cli, work: Counter[str]) -> None:
    lines = ["-e", "replace fc Linear(_,10)", "-e", "freeze layer1", "-e", "cast layer2 float64"]
    cli("apply", *lines, "-m", "resnet18", "--check", "none", "-o", "out.pth")
    assert (work[DESCRIBED], work[BUILT]) == (4, 1)
