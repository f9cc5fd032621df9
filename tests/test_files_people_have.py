"""Files as other programs and people leave them: each kind is made by torch, NumPy or safetensors themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelcli
from tests.conftest import Cli

STATE = {"0.weight": torch.arange(6.0).reshape(3, 2), "0.bias": torch.ones(3)}
ARCH = "Sequential(Linear(2,3))"


def shown(cli: Cli, *words: object) -> dict[str, object]:
    """The names and values of what `params` shows of a model."""
    return {row["name"]: row["values"] for row in cli("params", *words, "--values", "--json").json["tensors"]}


VALUES = {name: tensor.tolist() for name, tensor in STATE.items()}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"])
def test_a_folder_with_one_file_of_weights_by_its_bare_name(cli: Cli, folder: Path, name: str) -> None:
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text("{}")
    target = folder / "llama" / name
    save_file(STATE, target) if name.endswith(".safetensors") else torch.save(STATE, target)
    for reference in ("llama", "./llama", "llama/"):
        assert shown(cli, reference) == VALUES
    cli("save", "out.pth", "-m", "llama")
    assert torch.equal(torch.load("out.pth", weights_only=True)["0.weight"], STATE["0.weight"])
    assert torch.equal(modelcli.load("llama", arch=ARCH)[0].weight, STATE["0.weight"])


def test_a_folder_with_two_files_of_weights_asks_which(cli: Cli, folder: Path) -> None:
    (folder / "bert").mkdir()
    save_file(STATE, folder / "bert" / "model.safetensors")
    torch.save(STATE, folder / "bert" / "pytorch_model.bin")
    error = cli("summary", "bert", code=2).err
    assert "name one of bert/model.safetensors, bert/pytorch_model.bin" in error
    assert shown(cli, "bert/model.safetensors") == VALUES


def test_a_file_without_a_suffix_by_its_bare_name(cli: Cli, folder: Path) -> None:
    torch.save(STATE, "weights")
    torch.save(STATE, "step_1000")
    assert shown(cli, "weights") == shown(cli, "step_1000") == VALUES
    cli("summary", "resnet18", "--weights", "weights", code=1)  # it is read, and does not fit
    assert shown(cli, ARCH, "--weights", "weights") == VALUES
    cli("load", "weights")
    assert shown(cli) == VALUES  # through the recipe


def test_a_builder_goes_before_a_file_of_its_name_and_a_note_says_so(cli: Cli, folder: Path) -> None:
    (folder / "alexnet").mkdir()
    save_file(STATE, folder / "alexnet" / "model.safetensors")
    result = cli("summary", "alexnet", "--json").json
    assert result["totals"]["params"] == 61_100_840
    assert any("./alexnet" in note for note in result["notes"])
    assert any("./alexnet" in note for note in cli("summary", "alexnet", "--json").json["notes"])  # from the cache
    assert shown(cli, "./alexnet") == VALUES


def test_suffixes_in_capitals(cli: Cli, folder: Path) -> None:
    torch.save(STATE, "W.PTH")
    save_file(STATE, "W.SafeTensors")
    for name in ("W.PTH", "W.SafeTensors"):
        assert shown(cli, name) == VALUES
        assert shown(cli, ARCH, "--weights", name) == VALUES
    assert "no such file" in cli("summary", "resnet18", "--weights", "X.PTH", code=2).err
    cli("save", "OUT.PTH", "-m", "W.SafeTensors")
    cli("save", "OUT.SAFETENSORS", "-m", "W.PTH")
    assert torch.load("OUT.PTH", weights_only=True).keys() == STATE.keys()
    assert shown(cli, "OUT.SAFETENSORS") == VALUES


@pytest.mark.parametrize("name", ["out.ckpt", "out.bin", "OUT.BIN"])
def test_output_to_ckpt_and_bin_is_what_torch_save_writes(cli: Cli, folder: Path, name: str) -> None:
    torch.save({"state_dict": STATE, "epoch": 3}, "in.pth")
    cli("cast", "**", "float16", "-m", "in.pth", "-o", name)
    found = torch.load(name, weights_only=True)
    assert found["epoch"] == 3
    assert found["state_dict"]["0.weight"].dtype == torch.float16
    nn.Sequential(nn.Linear(2, 3)).load_state_dict(found["state_dict"])


def test_a_folder_that_exists_needs_no_slash_to_be_written_to(cli: Cli, folder: Path) -> None:
    torch.save(STATE, "in.pth")
    (folder / "out").mkdir()
    cli("save", "out", "-m", "in.pth", "--force")
    assert shown(cli, "out") == VALUES
