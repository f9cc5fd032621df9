"""An edit's module is imported when the edit is used, and other packages' edits are searched only when needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from modelcli import edits
from modelcli.errors import RequestError

IMPORTED = """
import contextlib, io, json, sys
from modelcli.cli import main

known = json.loads(sys.argv[1])
found = []
for words in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0
    found.append(["modelcli.edits" in sys.modules, sorted(name for name in known if name in sys.modules)])
print(json.dumps(found))
"""


def test_a_command_imports_no_edit_but_its_own(folder: Path) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), "v.pth")
    kinds = list(edits.usable())
    modules = {kind.name: kind.__module__ for kind in kinds}
    params, summary, of_one, of_all = imported(
        [*modules.values()], ["params", "v.pth"], ["summary", "v.pth"], ["remove", "--help"], ["--help"]
    )
    assert params == summary == [False, []]
    assert of_one == [True, [modules["remove"]]]
    assert of_all == [True, sorted(modules.values())]


def test_an_edit_of_a_state_dict_imports_no_torch_and_no_reader_of_recipes(folder: Path) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), "v.pth")
    others = ["torch", "numpy", "tomlkit", "modelcli.recipe", "modelcli.edits.replace"]
    (found,) = imported(others, ["freeze", "weight", "-m", "v.pth", "-o", "out.pth"])
    assert found == [True, []]


def imported(known: list[str], *lines: list[str]) -> list[list[object]]:
    """Run command lines in one process. After each: whether edits are imported, and which of these modules are."""
    words = [sys.executable, "-c", IMPORTED, json.dumps(known), json.dumps(lines)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: list[list[object]] = json.loads(done.stdout)
    return found


def test_the_classes_are_found_in_the_package() -> None:
    """`modelcli.edits.Replace` exists, as the README says."""
    for name in edits.own_names():
        kind = edits.find(name)
        assert kind is not None
        assert getattr(edits, kind.__name__) is kind
    with pytest.raises(AttributeError, match="Clamp"):
        edits.Clamp  # noqa: B018


def test_an_unknown_name() -> None:
    assert edits.find("clamp") is None
    with pytest.raises(RequestError, match="no such edit: 'clamp'"):
        edits.kind_called("clamp")


@pytest.mark.parametrize("name", edits.own_names())
def test_what_an_edit_declares(name: str) -> None:
    kind = edits.kind_called(name)
    assert kind.name == name
    assert kind.summary.endswith(".")
    assert not kind.effect.endswith(".")
    assert len(kind.examples) >= 2
    assert all(example.startswith(f"modelcli {name} ") for example in kind.examples)
    assert [operand.several for operand in kind.words].count(True) <= 1
    assert not any(operand.several for operand in kind.words[:-1])
    assert all(text.endswith(".") for text in (*(word.help for word in kind.words), *(o.help for o in kind.options())))
    assert not (kind.changes_values_only and kind.can_break_fit)
    assert not (kind.changes_flags_only and kind.can_break_fit)
    assert kind.places_module or not kind.replaces_module


def test_every_edit_is_in_the_tests_of_all_edits() -> None:
    """A new edit needs a line in the tests of `diff`, and one among the seed lines of the fuzzer."""
    from tests.commands import test_diff
    from tests.fuzz import languages

    words = {
        "test_diff.EDITS": [line for pair in test_diff.EDITS.items() for text in pair for line in text.split("; ")],
        "languages.GRAMMAR['edit']": languages.GRAMMAR["edit"],
        "languages.GRAMMAR['operation']": [*languages.GRAMMAR["operation"], *languages.GRAMMAR["edit"]],
        "languages._EDITS": [line.decode() for line in languages._EDITS],
    }
    for where, lines in words.items():
        named = {line.partition(" ")[0] for line in lines}
        assert [name for name in edits.own_names() if name not in named] == [], where
