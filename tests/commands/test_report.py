"""The command `report`: what it reads, what it writes where, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modelcli.commands import report as commands
from modelcli.language.references import Source
from tests.conftest import Cli
from tests.render.test_page import data_in


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 4))


def page_of(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8")


def test_one_line_says_what_was_written(cli: Cli, folder: Path) -> None:
    torch.save(net().state_dict(), "best.pth")
    found = cli("report", "best.pth")
    size = Path("best.html").stat().st_size
    assert found.out == f"written: best.html ({size / 1e6:.2f} MB)\n"
    assert page_of("best.html").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("alexnet", "alexnet.html"),
        ("runs/best.pth", "best.html"),
        ("runs/", "runs.html"),
        ("nets.py:Net(3,2)", "Net.html"),
        ("timm:vit_tiny_patch16_224", "vit_tiny_patch16_224.html"),
        ("Sequential(Linear(2,3))", "Sequential.html"),
        ("hf:Qwen/Qwen3-0.6B", "Qwen3-0.6B.html"),
        ("./-o &.pth", "o.html"),
    ],
)
def test_the_page_is_named_after_the_model(model: str, name: str, folder: Path) -> None:
    Path("runs").mkdir()
    for path in ("runs/best.pth", "runs/model.safetensors", "-o &.pth"):
        Path(path).touch()
    assert commands.default_name(Source(model)) == name


def test_a_page_is_not_replaced_without_force(cli: Cli, folder: Path) -> None:
    Path("net.html").write_text("mine")
    found = cli("report", "Linear(2,3)", "-o", "net.html", code=2)
    assert "net.html exists" in found.err
    assert page_of("net.html") == "mine"
    cli("report", "Linear(2,3)", "-o", "net.html", "--force")
    assert "<title>" in page_of("net.html")
    assert "is a folder" in cli("report", "Linear(2,3)", "-o", ".", code=2).err
    torch.save(net().state_dict(), "best.pth")
    before = Path("best.pth").read_bytes()
    found = cli("report", "best.pth", "-o", "best.pth", "--force", code=2)
    assert "hint: -o best.pth.html" in found.err
    assert Path("best.pth").read_bytes() == before


def test_a_key_is_for_the_training_checkpoints(cli: Cli, folder: Path) -> None:
    torch.save({"epoch": 3, "model": {"a.w": torch.ones(3)}, "ema": {"a.w": torch.zeros(3)}}, "train.pth")
    torch.save({"a.w": torch.full((3,), 2.0)}, "plain.pth")
    found = cli("report", "train.pth", "--key", "ema", "--against", "plain.pth", "--json").json["against"]
    assert found["tensors"][0]["max_abs_diff"] == 2
    assert found["tensors"][0]["relative_l2"] == 1


def test_a_file_is_read_without_torch(folder: Path) -> None:
    torch.save(net().state_dict(), "one.pth")
    state = net().state_dict()
    state["0.weight"] += 1
    torch.save(state, "other.pth")
    code = (
        "import sys; from modelcli.cli import main; "
        "code = main(['report', 'other.pth', '--against', 'one.pth', '--stats', '-q']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_totals_and_shapes_are_those_of_torch(cli: Cli, folder: Path) -> None:
    cli("report", "alexnet", "-o", "net.html")
    text = page_of("net.html")
    assert "61,100,840" in text
    assert "714,188,480" in text  # as torchvision publishes: 0.714 GMACs
    assert "[1,256,6,6]" in data_in(text)["tree"]["shapes"]


def test_the_record_and_frozen_parts_are_shown(cli: Cli, folder: Path) -> None:
    cli("freeze", "0", "-m", "Sequential(Linear(2,3),Linear(3,4))", "-o", "out.pth", "--seed", "7")
    cli("report", "out.pth", "-o", "net.html")
    text = page_of("net.html")
    assert "<code>freeze 0</code>" in text
    assert "<dt>Seed</dt><dd>7</dd>" in text
    assert "<dt>Frozen</dt><dd>9</dd>" in text.replace("<small>36 %</small>", "")
    assert "Sequential(Linear(2, 3), Linear(3, 4))" in text or "Sequential(Linear(2,3),Linear(3,4))" in text


def test_a_recipe_is_shown_with_its_edits(cli: Cli, folder: Path) -> None:
    cli("load", "Sequential(Linear(2,3),Linear(3,4))")
    cli("replace", "1", "Linear(_,9)")
    cli("report", "-o", "net.html")
    assert "<code>replace 1 Linear(_,9)</code>" in page_of("net.html")
    assert "modelcli.toml" in page_of("net.html")


def test_statistics_and_histograms_are_those_of_numpy(cli: Cli, folder: Path) -> None:
    state = net().state_dict()
    state["0.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), 0.0])
    torch.save(state, "best.pth")
    document = cli("report", "best.pth", "--stats", "--json").json
    tensors = {tensor["name"]: tensor for tensor in document["tensors"]}
    for name, tensor in state.items():
        numbers = tensor.double().flatten()
        finite = numbers[numbers.isfinite()].numpy()
        counts, edges = np.histogram(finite, 32)
        assert tensors[name]["histogram"] == {"low": edges[0], "high": edges[-1], "counts": counts.tolist()}
        assert tensors[name]["stats"]["max"] == finite.max()
    assert tensors["0.weight"]["stats"]["nan"] == 1
    rows = data_in(page_of("best.html"))["values"]
    assert len(rows) == len(state)
    assert all(len(row[8]) == 32 for row in rows)


def test_what_changed_since_another_model(cli: Cli, folder: Path) -> None:
    before = net().state_dict()
    after = {name: tensor.clone() for name, tensor in before.items() if name != "2.bias"}
    after["0.weight"] *= 1.5
    after["2.weight"] = torch.ones(5, 30)
    after["3.weight"] = torch.ones(2)
    torch.save(before, "before.pth")
    torch.save(after, "after.pth")
    document = cli("report", "after.pth", "--against", "before.pth", "--json").json["against"]
    changes: dict[str, Any] = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert {name: change["change"] for name, change in changes.items()} == {
        "0.weight": "values",
        "2.weight": "shape",
        "2.bias": "removed",
        "3.weight": "added",
    }
    assert changes["0.weight"]["relative_l2"] == pytest.approx(0.5)
    assert [name for name, change in changes.items() if change["relative_l2"] is not None] == ["0.weight"]
    assert cli("diff", "before.pth", "after.pth", "--json", code=1).json["same"] is False
    text = page_of("after.html")
    assert ">0.5</td>" in text
    assert ">0</td>" in text
    letters = [letter for _, letter, _ in data_in(text)["changes"]]
    assert sorted(letters) == ["A", "B", "B", "B", "B", "C", "C"]
    same = cli("report", "after.pth", "--against", "after.pth", "-o", "same.html", "--json").json["against"]
    assert same["same"] is True
    assert "are the same" in page_of("same.html")


def test_no_browser_is_opened_without_a_display(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    found = cli("report", "Linear(2,3)", "--open", code=2)
    assert "--open needs a display" in found.err
    assert not Path("Linear.html").exists()
    opened: list[str] = []

    def show(address: str) -> bool:
        opened.append(address)
        return True

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", show)
    cli("report", "Linear(2,3)", "--open")
    assert opened == [Path("Linear.html").resolve().as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda _: False)
    assert "no browser could be started" in cli("report", "Linear(2,3)", "--open", "--force", code=5).err


def test_notes_and_warnings_are_on_the_page(cli: Cli, folder: Path) -> None:
    torch.save(net(), "whole.pth")
    found = cli("report", "whole.pth", "-o", "net.html")
    for note in [line.partition(": ")[2] for line in found.err.splitlines() if line.startswith("note: ")]:
        assert json.dumps(note)[1:12] in page_of("net.html")
