"""The hint after a failing check repeats the edit with another module; that line works, with the edit's own options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import Cli

OWN = """
from collections import OrderedDict

from torch import nn


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(OrderedDict(first=nn.Linear(4, 6), norm=nn.LayerNorm(6), last=nn.Linear(6, 3)))

    def forward(self, x):
        return self.features(x)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = self.one

    def forward(self, x):
        return self.two(self.one(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x))


class Around(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.before = nn.Linear(6, 7)
        self.old = old

    def forward(self, x):
        return self.old(self.before(x))
"""

TWO = "Sequential(Linear(4,6),Sequential(Linear(6,6)))"

#: An edit whose module does not fit, the model, and the line that the hint gives.
CASES = [
    (
        "insert features.norm 'Linear(7,6)' --after",
        "own.py:Named",
        "insert features.norm 'Linear(_,6)' --after takes in_features=6 from what flows in",
    ),
    (
        "insert features.norm 'BatchNorm1d(7)' --after",
        "own.py:Named",
        "insert features.norm 'BatchNorm1d(_)' --after takes num_features=6 from what flows in",
    ),
    ("insert 1 'Linear(7,6)'", TWO, "insert 1 'Linear(_,6)' takes in_features=6 from what flows in"),
    ("insert 0 'Linear(7,6)' --after", TWO, "insert 1 'Linear(_,6)' takes in_features=6 from what flows in"),
    ("append 1 'Linear(7,3)'", TWO, "append 1 'Linear(_,3)' takes in_features=6 from what flows in"),
    ("append . 'Linear(7,3)'", TWO, "append . 'Linear(_,3)' takes in_features=6 from what flows in"),
    ("add 2 'Linear(7,3)'", TWO, "add 2 'Linear(_,3)' takes in_features=6 from what flows in"),
    ("replace 1.0 'Linear(7,3)'", TWO, "replace 1.0 'Linear(_,3)' takes in_features=6 from what flows in"),
    (
        "replace 1.0 'Linear(7,3)' --keep-weights",
        TWO,
        "replace 1.0 'Linear(_,3)' --keep-weights takes in_features=6 from what flows in",
    ),
    (
        "replace '{one,two}' 'Linear(7,4)'",
        "own.py:Shared",
        "replace one 'Linear(_,4)' --also two takes in_features=4 from what flows in",
    ),
    (
        "replace two 'Linear(7,4)' --untie",
        "own.py:Shared",
        "replace two 'Linear(_,4)' --untie takes in_features=4 from what flows in",
    ),
    (
        "replace one 'Linear(7,4)' --tie",
        "own.py:Tied",
        "replace one 'Linear(_,4)' --tie takes in_features=4 from what flows in",
    ),
]


@pytest.fixture(autouse=True)
def own(folder: Path) -> None:
    (folder / "own.py").write_text(OWN, encoding="utf-8")


@pytest.mark.parametrize(("line", "model", "hint"), CASES)
def test_the_hint_is_a_line_that_works(cli: Cli, line: str, model: str, hint: str) -> None:
    words = ("-m", model, "--input-size", "2,4")
    error = cli(*shlex.split(line), *words, code=2).err
    assert f"hint: {hint}" in error
    mended = shlex.split(hint.partition(" takes ")[0])
    assert cli(*mended, *words, "--json").json["check"]["ran"]


def test_the_hint_of_one_edit_of_several(cli: Cli) -> None:
    """Paths of the edits before it do not count where they have moved."""
    words = ("-m", "own.py:Named", "--input-size", "2,4")
    first, wrong = "insert features.first ReLU --after", "insert features.relu Linear(7,6) --after"
    error = cli("apply", "-e", first, "-e", wrong, *words, code=2).err
    assert f"-e 2: '{wrong}': features.linear Linear(7, 6) does not fit" in error
    found = re.search(r"hint: (insert features.relu .* --after) takes in_features=6", error)
    assert found is not None
    mended = " ".join(shlex.split(found[1]))
    assert cli("apply", "-e", first, "-e", mended, *words, "--json").json["check"]["ran"]


@pytest.mark.parametrize(
    ("wrapper", "path"),
    [
        ("Sequential(Linear(6,7),_)", "1.1"),
        ("Sequential(Sequential(Linear(6,7)),Sequential(ReLU(),_))", "1.1.1"),
    ],
)
def test_the_old_module_in_a_wrapper_is_not_to_be_written_anew(cli: Cli, wrapper: str, path: str) -> None:
    """It is `_`, so the expression does not contain it: what the wrapper does before it has to change."""
    words = ("-m", "Sequential(Linear(4,6),Linear(6,6))", "--input-size", "2,4")
    error = cli("wrap", "1", wrapper, *words, code=2).err
    told = f"{path} Linear(6, 6) was there before and takes [*,6]: change what the new module at 1 does before it"
    assert f"hint: {told}" in error
    assert cli("wrap", "1", wrapper.replace("6,7", "6,6"), *words, "--json").json["check"]["ran"]


def test_a_wrapper_of_a_class_that_builds_its_children(cli: Cli) -> None:
    words = ("-m", "Sequential(Linear(4,6),Linear(6,6))", "--input-size", "2,4")
    error = cli("wrap", "1", "own.py:Around(_)", *words, code=2).err
    assert "hint: 1.old Linear(6, 6) takes [*,6]: change what the new module at 1 does before it" in error


def test_a_new_module_inside_a_wrapper_is_written_with_another_size(cli: Cli) -> None:
    words = ("-m", TWO, "--input-size", "2,4")
    error = cli("wrap", "1", "Sequential(_,Linear(7,3))", *words, code=2).err
    assert "hint: write Linear(6,3) instead of Linear(7, 3) inside the new module at 1" in error
    assert cli("wrap", "1", "Sequential(_,Linear(6,3))", *words, "--json").json["check"]["ran"]
