"""State dicts with very many keys: the work of edits grows linearly, and headers have a maximum size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modelcli import checkpoints
from modelcli.checkpoints import limits
from modelcli.checkpoints.safetensors import writing as safetensors
from tests.conftest import Cli

EDITS = (
    ("rename", "model.**", "**"),
    ("remove", "model.layers.4"),
    ("freeze", "model.layers"),
    ("extract", "model"),
)


def many(count: int) -> dict[str, torch.Tensor]:
    """Return `count` tensors, each in a module of its own."""
    names = (f"model.layers.{number // 10}.part{number % 10}.weight" for number in range(count))
    return {name: torch.full((1,), float(number)) for number, name in enumerate(names)}


#: A program that runs commands and writes down how many functions each called, C functions included.
COUNTING = """
import json, sys
from modelcli.cli import main

found = 0

def count(_frame, event, _argument):
    global found
    found += event in ("call", "c_call")

counts = []
for words in json.loads(sys.stdin.read()):
    before = found
    sys.setprofile(count)
    code = main(words)
    sys.setprofile(None)
    counts.append([code, found - before])
with open("counts.json", "w") as file:
    json.dump(counts, file)
"""


def calls(folder: Path, commands: Sequence[Sequence[str]]) -> list[int]:
    """Return how many functions each command calls. The numbers are the same on every machine.

    They run in a process of their own, which is started again if it does not end: Python 3.11 may loop forever at the
    start of a function while `sys.setprofile` is in use.
    """
    for attempt in range(3):
        try:
            subprocess.run(
                [sys.executable, "-c", COUNTING],
                input=json.dumps(commands),
                capture_output=True,
                text=True,
                check=True,
                cwd=folder,
                timeout=100,
            )
            break
        except subprocess.TimeoutExpired:
            if attempt == 2:
                raise
    found = json.loads((folder / "counts.json").read_text())
    assert [code for code, _ in found] == [0] * len(commands)
    return [number for _, number in found]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("edit", EDITS, ids=[edit[0] for edit in EDITS])
def test_the_work_of_an_edit_grows_with_the_keys(folder: Path, edit: Sequence[str], suffix: str) -> None:
    """From 600 to 900 keys it grows as much as from 300 to 600. Quadratic work would grow by two thirds more."""
    commands = []
    for count in (50, 300, 600, 900):  # the first run imports what the others need
        write = save_file if suffix == ".safetensors" else torch.save
        write(many(count), f"{count}{suffix}")
        commands.append((*edit, "-m", f"{count}{suffix}", "-o", f"out{suffix}", "--force", "--no-fsync", "-q"))
    _, one, two, three = calls(folder, commands)
    assert two - one > 300  # at least a call for each key, or nothing was counted
    assert three - two < 1.1 * (two - one)


# --- headers that safetensors cannot read ----------------------------------------------------------------------------


def header_of(path: str) -> dict[str, object]:
    data = Path(path).read_bytes()
    header: dict[str, object] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def test_a_record_that_does_not_fit_into_the_header(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are written, and a note says that the record is not."""
    save_file(many(100), "in.safetensors")
    cli("freeze", "model", "-m", "in.safetensors", "-o", "whole.safetensors")
    without = {name: info for name, info in header_of("whole.safetensors").items() if name != "__metadata__"}
    most = len(json.dumps(without, separators=(",", ":"))) + 100
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", most)
    told = cli("freeze", "model", "-m", "in.safetensors", "-o", "out.safetensors").err
    assert "note: out.safetensors carries no record of its edits and flags: the header would have " in told
    assert f"bytes with it, and safetensors reads no header of more than {most:,} bytes" in told
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert load_file("out.safetensors").keys() == many(100).keys()
    assert checkpoints.read(Path("out.safetensors")).record is None


def test_a_header_that_is_too_large_by_itself(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written, and the command that the error suggests works."""
    save_file(many(100), "in.safetensors")
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", 6_000)
    told = cli("freeze", "model", "-m", "in.safetensors", "-o", "out.safetensors", code=2).err
    assert "the names and shapes of 100 tensors make a header of " in told
    assert "and safetensors reads no header of more than 6,000 bytes" in told
    assert "write a folder of shards, whose headers are smaller: -o out/" in told
    assert not Path("out.safetensors").exists()
    cli("freeze", "model", "-m", "in.safetensors", "-o", "out/")
    shards = sorted(Path("out").glob("*.safetensors"))
    assert len(shards) > 1
    assert all(int.from_bytes(shard.read_bytes()[:8], "little") <= 6_000 for shard in shards)
    assert {name for shard in shards for name in load_file(shard)} == set(many(100))
    record = checkpoints.read(Path("out")).record
    assert record is not None
    assert len(record.frozen) == 100


def test_a_record_that_does_not_fit_into_the_index(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(many(100), "in.safetensors")
    monkeypatch.setenv(limits.INDEX_BYTES.variable, "10000")
    told = cli("freeze", "model", "-m", "in.safetensors", "-o", "out/").err
    assert "note: out carries no record of its edits and flags: the index would have " in told
    assert checkpoints.read(Path("out")).record is None
    assert len(checkpoints.read(Path("out")).tensors) == 100
