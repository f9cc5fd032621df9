"""With --json, standard error contains at most the JSON document of an error, whatever other code prints there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from tests.conftest import Cli

LOUD = """
import sys
import torch

class Loud(torch.nn.Linear):
    def __init__(self, lines=1):
        super().__init__(2, 3)
        for number in range(lines):
            print("out", number)
            print("err", number, file=sys.stderr)

    def forward(self, x):
        sys.stderr.buffer.write(b"raw\\n")
        return super().forward(x)

class Broken(torch.nn.Linear):
    def __init__(self):
        print("before the end")
        raise ValueError("no luck")
"""


@pytest.fixture
def _loud(folder: Path) -> None:
    (folder / "loud.py").write_text(LOUD)


@pytest.mark.usefixtures("_loud")
def test_output_printed_by_a_model_becomes_a_note_of_the_document(cli: Cli) -> None:
    shown = cli("summary", "loud.py:Loud", "--input-size", "1,2", "--json")
    assert shown.err == ""
    assert {"printed: out 0", "printed: err 0", "printed: raw"} <= set(shown.json["notes"])
    assert "out 0" in cli("summary", "loud.py:Loud", "--input-size", "1,2").err
    assert "notes" not in cli("summary", "loud.py:Loud", "--input-size", "1,2", "--json", "-q").json


@pytest.mark.usefixtures("_loud")
def test_endless_output_of_a_model_is_cut(cli: Cli) -> None:
    shown = cli("summary", "loud.py:Loud(lines=50000)", "--input-size", "1,2", "--json")
    assert shown.err == ""
    assert len(shown.json["notes"]) < 30
    assert any("more lines were printed" in note for note in shown.json["notes"])


@pytest.mark.usefixtures("_loud")
def test_an_error_is_the_only_thing_on_standard_error(cli: Cli) -> None:
    found = cli("summary", "loud.py:Broken", "--json", code=2)
    assert found.out == ""
    assert "no luck" in found.error["message"]
    assert "printed: before the end" in found.error["notes"]


def test_a_download_writes_nothing_to_standard_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_url: str, path: Any, *_args: Any, **_given: Any) -> None:
        print("100%", file=sys.stderr)
        torch.save(torchvision.models.squeezenet1_1().state_dict(), path)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    shown = cli("save", "out.pth", "-m", "squeezenet1_1", "--weights", "DEFAULT", "--json")
    assert shown.err == ""
    assert any(note.startswith("printed: Downloading") for note in shown.json["notes"])
