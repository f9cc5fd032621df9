"""Files as other programs and people leave them: each kind is made by torch, NumPy or safetensors themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# --- wrappers --------------------------------------------------------------------------------------------------------


class Body(nn.Module):
    """Two blocks and a head, whose state is compared with what a wrapper saved of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


def wrapped(module: nn.Module, *names: str) -> nn.Module:
    """A module inside others, under these names."""
    for name in reversed(names):
        outer = nn.Module()
        outer.add_module(name, module)
        module = outer
    return module


def with_layers_wrapped(name: str) -> nn.Module:
    """What FSDP, activation checkpointing and torch.compile of single layers make of a model."""
    body = Body()
    body.layers[0] = wrapped(body.layers[0], name)
    body.layers[1][0] = wrapped(body.layers[1][0], name)
    body.layers[1] = wrapped(body.layers[1], name)
    return body


def compiled(module: nn.Module) -> Any:
    return torch.compile(module)


def compiled_layers() -> Any:
    body = Body()
    body.layers[1] = torch.compile(body.layers[1])
    body.head = torch.compile(body.head)
    return body


class Lit(nn.Module):
    """As a LightningModule keeps its network, and what it measures with beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = wrapped(Body(), "net")


WRAPPERS: dict[str, Callable[[], Any]] = {
    "fsdp": lambda: wrapped(with_layers_wrapped("_fsdp_wrapped_module"), "_fsdp_wrapped_module"),
    "checkpointing": lambda: with_layers_wrapped("_checkpoint_wrapped_module"),
    "compiled layers": compiled_layers,
    "compiled and parallel": lambda: nn.DataParallel(compiled(compiled_layers())),
    "lightning": Lit,
    "opacus": lambda: wrapped(Body(), "_module"),
    "backbone": lambda: wrapped(Body(), "backbone"),
    "fabric": lambda: wrapped(Body(), "_forward_module"),
    "any attribute": lambda: wrapped(Body(), "policy", "actor"),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(Body()),
    "averaged, parallel, compiled": lambda: torch.optim.swa_utils.AveragedModel(nn.DataParallel(compiled(Body()))),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_wrappers_put_into_keys_is_removed_and_said(cli: Cli, folder: Path, kind: str) -> None:
    body_file(folder)
    torch.manual_seed(1)
    module = WRAPPERS[kind]()
    state = module.state_dict()
    torch.save(state, "wrapped.pth")
    result = cli("load", "wrapped.pth", "--arch", "body.py:Body", "--json").json
    assert (result["matched"], result["missing"], result["unexpected"]) == (len(Body().state_dict()), [], [])
    assert any("stripped" in note and "a wrapper had put" in note for note in result["notes"])
    cli("save", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    loaded = Body()
    loaded.load_state_dict(written)
    weights = [tensor for name, tensor in state.items() if not name.endswith("n_averaged")]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.state_dict().values(), weights, strict=True))
    if kind.startswith("averaged"):
        assert any("n_averaged counts its averages, and was left out" in note for note in result["notes"])


def body_file(folder: Path) -> None:
    (folder / "body.py").write_text(
        "from torch import nn\n\nclass Body(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layers = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))\n"
        "        self.head = nn.Linear(3, 2)\n\n    def forward(self, x):\n"
        "        return self.head(self.layers(x))\n"
    )


def test_the_script_takes_the_wrappers_names_out_as_well(cli: Cli, folder: Path) -> None:
    torch.save(torch.optim.swa_utils.AveragedModel(with_layers_wrapped("_orig_mod")).state_dict(), "wrapped.pth")
    body_file(folder)
    cli("load", "wrapped.pth", "--arch", "body.py:Body")
    script = cli("script", "--out", "plain.pth").out
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    assert torch.load("plain.pth", weights_only=True).keys() == Body().state_dict().keys()


def test_a_module_of_the_architecture_s_own_is_no_wrapper(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(
        "from torch import nn\n\nclass Own(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.module = nn.Sequential(nn.Linear(2, 3))\n        self.model = nn.Linear(3, 2)\n"
    )
    state = {f"module.{name}": torch.ones(1) for name in ("module.0.weight", "module.0.bias")}
    state["module.module.0.weight"], state["module.module.0.bias"] = torch.ones(3, 2), torch.ones(3)
    state["module.model.weight"], state["module.model.bias"] = torch.ones(2, 3), torch.ones(2)
    torch.save(state, "parallel.pth")
    result = cli("load", "parallel.pth", "--arch", "own.py:Own", "--json").json
    assert (result["matched"], result["missing"], result["unexpected"]) == (4, [], [])


def test_several_models_in_one_file_are_named_not_denied(cli: Cli, folder: Path) -> None:
    body_file(folder)
    state = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in Body().state_dict().items()}
    torch.save(state, "distilled.pth")
    error = cli("load", "distilled.pth", "--arch", "body.py:Body", code=1).err
    assert "stand below student, teacher in the file" in error
    assert "nothing in the file belongs" not in error
    cli("extract", "student", "-m", "distilled.pth", "-o", "student.pth")  # as the error says
    cli("load", "student.pth", "--arch", "body.py:Body")


def test_identify_and_diff_know_wrappers_in_the_middle(cli: Cli, folder: Path) -> None:
    state = Body().state_dict()
    torch.save(state, "plain.pth")
    torch.save({f"model.net.{name}": value for name, value in state.items()}, "lightning.pth")
    notes = cli("diff", "lightning.pth", "plain.pth", "--json", code=1).json["notes"]
    assert any("modelcli rename 'model.net.**' '**'" in note for note in notes)
    torch.save({name.replace("layers.", "layers._orig_mod."): value for name, value in state.items()}, "compiled.pth")
    notes = cli("diff", "compiled.pth", "plain.pth", "--json", code=1).json["notes"]
    assert any("_orig_mod" in note and "a wrapper had put there" in note for note in notes)
