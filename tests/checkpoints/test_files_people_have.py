"""Files as users and other programs write them. Each is created by torch, NumPy or safetensors themselves."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import functools
import io
import os
import pickle
import subprocess
import tracemalloc
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelcli
from tests.conftest import Cli

STATE = {"0.weight": torch.arange(6.0).reshape(3, 2), "0.bias": torch.ones(3)}
ARCH = "Sequential(Linear(2,3))"


def shown(cli: Cli, *words: object) -> dict[str, object]:
    """Return the names and values that `params` shows."""
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
    cli("summary", "resnet18", "--weights", "weights", code=1)  # the file is read and does not fit
    assert shown(cli, ARCH, "--weights", "weights") == VALUES
    cli("load", "weights")
    assert shown(cli) == VALUES  # from the recipe


def test_a_builder_takes_precedence_over_a_file_with_a_note(cli: Cli, folder: Path) -> None:
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
    """Two blocks and a head. Its state dict is compared with that saved from a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


def wrapped(module: nn.Module, *names: str) -> nn.Module:
    """Return a module inside others, under these names."""
    for name in reversed(names):
        outer = nn.Module()
        outer.add_module(name, module)
        module = outer
    return module


def with_layers_wrapped(name: str) -> nn.Module:
    """Return a model with single layers wrapped, as FSDP, activation checkpointing and torch.compile do."""
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
    """A module like a LightningModule, with a network and metrics beside it."""

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
def test_prefixes_of_wrappers_are_removed_with_a_note(cli: Cli, folder: Path, kind: str) -> None:
    body_file(folder)
    torch.manual_seed(1)
    module = WRAPPERS[kind]()
    state = module.state_dict()
    torch.save(state, "wrapped.pth")
    result = cli("load", "wrapped.pth", "--arch", "body.py:Body", "--json").json
    assert (result["matched"], result["missing"], result["unexpected"]) == (len(Body().state_dict()), [], [])
    assert any("stripped" in note and "a wrapper had added" in note for note in result["notes"])
    cli("save", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    loaded = Body()
    loaded.load_state_dict(written)
    weights = [tensor for name, tensor in state.items() if not name.endswith("n_averaged")]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.state_dict().values(), weights, strict=True))
    if kind.startswith("averaged"):
        assert any("n_averaged counts its averages and was left out" in note for note in result["notes"])


def body_file(folder: Path) -> None:
    (folder / "body.py").write_text(
        "from torch import nn\n\nclass Body(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layers = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))\n"
        "        self.head = nn.Linear(3, 2)\n\n    def forward(self, x):\n"
        "        return self.head(self.layers(x))\n"
    )


def test_the_script_removes_the_wrappers_prefixes_too(cli: Cli, folder: Path) -> None:
    torch.save(torch.optim.swa_utils.AveragedModel(with_layers_wrapped("_orig_mod")).state_dict(), "wrapped.pth")
    body_file(folder)
    cli("load", "wrapped.pth", "--arch", "body.py:Body")
    script = cli("script", "--out", "plain.pth").out
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    assert torch.load("plain.pth", weights_only=True).keys() == Body().state_dict().keys()


def test_a_module_of_the_architecture_is_not_taken_for_a_wrapper(cli: Cli, folder: Path) -> None:
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


def test_the_error_for_several_models_in_one_file_names_them(cli: Cli, folder: Path) -> None:
    body_file(folder)
    state = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in Body().state_dict().items()}
    torch.save(state, "distilled.pth")
    error = cli("load", "distilled.pth", "--arch", "body.py:Body", code=1).err
    assert "below student, teacher: " in error
    assert "nothing in the file belongs" not in error
    cli("extract", "student", "-m", "distilled.pth", "-o", "student.pth")  # as the error suggests
    cli("load", "student.pth", "--arch", "body.py:Body")


def test_identify_and_diff_remove_wrapper_prefixes_in_the_middle(cli: Cli, folder: Path) -> None:
    state = Body().state_dict()
    torch.save(state, "plain.pth")
    torch.save({f"model.net.{name}": value for name, value in state.items()}, "lightning.pth")
    notes = cli("diff", "lightning.pth", "plain.pth", "--json", code=1).json["notes"]
    assert any("modelcli rename 'model.net.**' '**'" in note for note in notes)
    torch.save({name.replace("layers.", "layers._orig_mod."): value for name, value in state.items()}, "compiled.pth")
    notes = cli("diff", "compiled.pth", "plain.pth", "--json", code=1).json["notes"]
    assert any("_orig_mod" in note and "a wrapper added" in note for note in notes)


# --- training checkpoints: where the state dict is -------------------------------------------------------------------


def adam(module: nn.Module) -> dict[str, Any]:
    """Return the state dict of an optimizer after one step."""
    optimizer = torch.optim.Adam(module.parameters())
    sum(p.sum() for p in module.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


def linear() -> dict[str, Any]:
    return nn.Linear(2, 3).state_dict()


def composer() -> Any:
    return {
        "state": {"model": linear(), "optimizers": {"Adam": adam(nn.Linear(2, 3))}, "run_name": "x"},
        "rng": [{"torch": torch.get_rng_state()}],
    }


def diffusion_policy() -> Any:
    return {
        "cfg": {"n": 1},
        "state_dicts": {"model": linear(), "ema_model": linear(), "optimizer": adam(nn.Linear(2, 3))},
        "pickles": {"global_step": b"1"},
    }


def norm_beside() -> Any:
    return {"norm": {"mean": torch.ones(3)}, "model": {"net": linear()}}


def lightning() -> Any:
    return {
        "epoch": 1,
        "state_dict": linear(),
        "optimizer_states": [adam(nn.Linear(2, 3))],
        "loops": {"fit_loop": {}},
        "callbacks": {"EMA": {"decay": 0.9}},
        "hyper_parameters": {"lr": 0.1},
    }


@pytest.mark.parametrize(
    ("made", "key", "others"),
    [
        (composer, "state.model", ""),
        (diffusion_policy, "state_dicts.model", "state_dicts.ema_model"),
        (norm_beside, "model.net", "norm"),
        (lightning, "state_dict", ""),
    ],
)
def test_a_nested_state_dict_is_found(cli: Cli, folder: Path, made: Any, key: str, others: str) -> None:
    tree = made()
    torch.save(tree, "train.pt")
    result = cli("params", "train.pt", "--values", "--json").json
    wanted = tree
    for step in key.split("."):
        wanted = wanted[step]
    assert {row["name"]: row["values"] for row in result["tensors"]} == {n: t.tolist() for n, t in wanted.items()}
    told = f"took the state dict under {key!r} of train.pt" + (f"; --key takes another: {others}" if others else "")
    assert told in result["notes"]
    cli("cast", "**", "float16", "-m", "train.pt", "-o", "half.pt")
    written: Any = torch.load("half.pt", weights_only=True)
    assert written.keys() == tree.keys()
    for step in key.split("."):
        written = written[step]
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}


def test_diff_of_checkpoints_with_several_state_dicts(cli: Cli, folder: Path) -> None:
    for name, value in (("a.pth", 1.0), ("b.pth", 2.0)):
        torch.save({"norm": {"mean": torch.ones(3)}, "model": {"net": {"w": torch.full((2,), value)}}}, name)
    cli("diff", "a.pth", "b.pth", code=1)


def test_the_error_for_several_state_dicts_lists_every_key(cli: Cli, folder: Path) -> None:
    torch.save({"netG": linear(), "netD": linear(), "epoch": 3}, "gan.pth")
    error = cli("summary", "gan.pth", code=2).err
    assert "gan.pth contains 2 state dicts" in error
    for key in ("netG", "netD"):
        assert f"--key {key} (2 tensors)" in error
        cli("summary", "gan.pth", "--key", key)
    megatron = {
        "args": {"n": 1},
        "checkpoint_version": 3.0,
        "iteration": 5,
        "model": {
            "language_model": {
                "embedding": {"word_embeddings": {"weight": torch.ones(4, 2)}},
                "encoder": {f"layers.{i}.weight": torch.ones(2, 2) for i in range(9)},
            }
        },
        "optimizer": {"optimizer": adam(nn.Linear(2, 3))},
        "rng_state": [{"torch_rng_state": torch.ones(3)}],
    }
    torch.save(megatron, "megatron.pt")
    error = cli("summary", "megatron.pt", code=2).err
    assert "holds no" not in error
    for key in ("model.language_model.embedding.word_embeddings", "model.language_model.encoder"):
        assert f"--key {key} " in error
        cli("summary", "megatron.pt", "--key", key)


def test_key_reaches_into_lists(cli: Cli, folder: Path) -> None:
    one, two = linear(), linear()
    torch.save({"models": [one, two], "epoch": 3}, "ensemble.pth")
    assert "--key models.0 (2 tensors), --key models.1" in cli("params", "ensemble.pth", code=2).err
    assert shown(cli, "ensemble.pth", "--key", "models.1")["weight"] == two["weight"].tolist()
    assert (
        "models is a list: use an index from 0 to 1" in cli("params", "ensemble.pth", "--key", "models.2", code=2).err
    )
    cli("freeze", "weight", "-m", "ensemble.pth", "--key", "models.1")
    cli("cast", "weight", "float16", "-m", "ensemble.pth", "--key", "models.1", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    assert [state["weight"].dtype for state in written["models"]] == [torch.float32, torch.float16]
    assert written["epoch"] == 3
    torch.save([one, two], "list.pth")
    assert shown(cli, "list.pth", "--key", "0")["weight"] == one["weight"].tolist()
    cli("cast", "weight", "float16", "-m", "list.pth", "--key", "0", "-o", "list2.pth")
    assert torch.load("list2.pth", weights_only=True)[0]["weight"].dtype == torch.float16
    script = cli("script", "-m", "list.pth", "--key", "0", "-e", "cast weight float16", "--out", "s.pth").out
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    assert torch.load("s.pth", weights_only=True)[0]["weight"].dtype == torch.float16


def test_a_nested_tensor_beside_the_state_dict_is_kept(cli: Cli, folder: Path) -> None:
    state = {"a.weight": torch.ones(2), "b.weight": torch.ones(2), "epoch": 3, "stats": {"mean": torch.full((1,), 7.0)}}
    torch.save(state, "in.pth")
    assert shown(cli, "in.pth").keys() == {"a.weight", "b.weight", "stats['mean']"}
    cli("cast", "**", "float16", "-m", "in.pth", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    assert written["epoch"] == 3
    assert torch.equal(written["stats"]["mean"], torch.full((1,), 7.0))
    assert written["a.weight"].dtype == torch.float16


def test_a_smaller_state_dict_of_a_usual_name_among_tensors_is_not_the_model(cli: Cli, folder: Path) -> None:
    state = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).state_dict()
    torch.save({**state, "ema": {"0.weight": torch.ones(4, 4)}}, "in.pth")
    assert shown(cli, "in.pth").keys() == {*state, "ema['0.weight']"}
    cli("rename", "0.**", "a.**", "-m", "in.pth", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    assert written.keys() == {"a.weight", "a.bias", "1.weight", "1.bias", "ema"}
    told = cli("rename", "0.**", "a.**", "-m", "in.pth", "--key", "ema", "-o", "ema.pth").err
    assert "the state dict at the top level of the file is unchanged and no longer fits 0.weight\n" in told
    figures = {"torch_rng_state": torch.get_rng_state(), **{f"figure{n}": torch.ones(3) for n in range(5)}}
    torch.save({"model": state, **figures}, "train.pth")
    assert shown(cli, "train.pth").keys() == state.keys()


def test_rename_leaves_values_beside_the_tensors(cli: Cli, folder: Path) -> None:
    torch.save({"w": torch.ones(2), "b.w": torch.ones(2), "epoch": 3, "stats": {"mean": torch.ones(1)}}, "in.pth")
    cli("rename", "**", "x.**", "-m", "in.pth", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    assert written.keys() == {"x.w", "x.b.w", "epoch", "stats"}
    script = cli("script", "-m", "in.pth", "-e", "rename ** x.**", "--out", "s.pth").out
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    assert torch.load("s.pth", weights_only=True).keys() == written.keys()
    cli("rename", "epoch", "step", "-m", "in.pth", "-o", "named.pth")  # the name is given exactly
    assert torch.load("named.pth", weights_only=True)["step"] == 3


# --- training checkpoints: values beside the state dict --------------------------------------------------------------


class Phase(enum.Enum):
    """A user's enum."""

    WARM_UP = "warm up"
    MAIN = 2


class Config(collections.OrderedDict[str, Any]):
    """A configuration like that of many programs."""


def beside() -> dict[str, Any]:
    """Return values that training loops save beside the state dict."""
    space = argparse.Namespace(lr=0.1, out=Path("runs/1"), betas=(0.9, 0.95), nested=argparse.Namespace(n=None))
    config = Config(lr=0.1)
    config["inner"] = Config(depth=3)
    return {
        "epoch": 3,
        "best": np.float64(0.25),
        "step": np.int64(7),
        "curve": np.arange(6.0).reshape(2, 3),
        "dtype": np.dtype("float32"),
        "rng": np.random.RandomState(1).get_state(),
        "out": Path("runs/1"),
        "args": space,
        "started": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        "took": datetime.timedelta(seconds=3),
        "phase": Phase.WARM_UP,
        "next": Phase.MAIN,
        "config": config,
        "counts": collections.defaultdict(int, a=1),
        "last": collections.deque([1, 2], maxlen=5),
        "tags": frozenset({"a"}),
        "id": uuid.UUID(int=5),
        "price": decimal.Decimal("1.5"),
        "blob": b"",
        "steps": range(3, 9, 2),
    }


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, np.ndarray):
        return bool(ours.dtype == theirs.dtype and np.array_equal(ours, theirs))
    if isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and bool(ours == theirs)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_objects_of_standard_types_beside_the_state_dict_are_kept(cli: Cli, folder: Path, legacy: bool) -> None:
    net = nn.Linear(2, 3)
    tree = {"model": net.state_dict(), "optimizer": adam(net), **beside()}
    torch.save(tree, "train.pth", _use_new_zipfile_serialization=not legacy)
    result = cli("cast", "weight", "float16", "-m", "train.pth", "-o", "out.pth", "--json").json
    assert any("are copied without loading them" in note for note in result["notes"])
    written = torch.load("out.pth", weights_only=False)
    assert list(written) == list(tree)
    assert written["model"]["weight"].dtype == torch.float16
    assert torch.equal(written["optimizer"]["state"][0]["exp_avg"], tree["optimizer"]["state"][0]["exp_avg"])
    for name, theirs in beside().items():
        assert same(written[name], theirs), name
    for file in ("train.pth", "out.pth"):
        (row,) = cli("check", file, "--safe", "--json", code=1).json["checks"]
        assert "argparse.Namespace" in row["found"]
    torch.save({**linear(), "_extra_state": io.BytesIO(b"scales")}, "stream.pth")  # as Megatron saves it
    cli("cast", "weight", "float16", "-m", "stream.pth", "-o", "streamed.pth")
    assert torch.load("streamed.pth", weights_only=False)["_extra_state"].getvalue() == b"scales"
    cli("freeze", ".", "-m", "out.pth", "-o", "again.pth")  # the written file can be edited again
    assert same(torch.load("again.pth", weights_only=False)["phase"], Phase.WARM_UP)


def test_objects_in_a_flat_checkpoint_are_kept(cli: Cli, folder: Path) -> None:
    torch.save({"w": torch.ones(2), "args": argparse.Namespace(lr=0.1), "best": np.float32(1)}, "in.pth")
    cli("rename", "**", "x.**", "-m", "in.pth", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=False)
    assert written.keys() == {"x.w", "args", "best"}
    assert written["args"] == argparse.Namespace(lr=0.1)


class Calls:
    """An object pickled as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


class Loaded:
    """A user's object that runs code when it is loaded."""

    def __init__(self) -> None:
        self.path = "x"


@pytest.mark.parametrize(
    "value",
    [
        Calls(os.system, "true"),
        Calls(subprocess.Popen, "true"),
        Calls(eval, "1"),
        Calls(Path.touch, Path("x")),
        Calls(Phase, Phase("warm up"), 1),
        Calls(Loaded, "/tmp/x.so"),
        Calls(collections.defaultdict, os.getcwd),
        os.system,
        Loaded(),
        functools.partial(os.system, "true"),
        nn.Linear(2, 2),
    ],
    ids=[
        "system",
        "Popen",
        "eval",
        "touch",
        "enum",
        "own class called",
        "factory",
        "function",
        "own class",
        "partial",
        "module",
    ],
)
def test_any_other_object_beside_the_state_dict_is_refused(cli: Cli, folder: Path, value: Any) -> None:
    torch.save({"model": linear(), "args": argparse.Namespace(lr=0.1), "x": value}, "train.pth")
    error = cli("cast", "weight", "float16", "-m", "train.pth", "-o", "out.pth", code=3).err
    assert "--tensors-only" in error
    assert not Path("out.pth").exists()
    cli("cast", "weight", "float16", "-m", "train.pth", "-o", "out.pth", "--tensors-only")
    assert torch.load("out.pth", weights_only=True).keys() == linear().keys()


def test_a_whole_pickled_module_is_refused_as_before(cli: Cli, folder: Path) -> None:
    torch.save({"model": nn.Linear(2, 3), "args": argparse.Namespace(lr=0.1)}, "whole.pth")
    cli("cast", "weight", "float16", "-m", "whole.pth", "-o", "out.pth", code=3)


# --- compressed archives ---------------------------------------------------------------------------------------------


def repacked(source: str, target: str, method: int = zipfile.ZIP_DEFLATED) -> None:
    """Write the records into an archive as another program does."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def test_a_deflated_archive_is_read_as_torch_reads_it(cli: Cli, folder: Path) -> None:
    base = torch.randn(40)
    torch.save({"model": {"a": torch.randn(300, 7), "b": base[3:9], "c": base.view(8, 5).T}, "n": 3}, "plain.pth")
    repacked("plain.pth", "deflated.pth")
    theirs = torch.load("deflated.pth", weights_only=True)
    assert shown(cli, "deflated.pth") == {name: tensor.tolist() for name, tensor in theirs["model"].items()}
    cli("diff", "plain.pth", "deflated.pth")
    cli("check", "deflated.pth", "--finite", "--safe")
    cli("save", "out.pth", "-m", "deflated.pth", "--verify")
    written = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(written["model"][name], tensor) for name, tensor in theirs["model"].items())
    cli("save", "out.safetensors", "-m", "deflated.pth")
    cli("diff", "out.safetensors", "plain.pth")
    assert cli("params", "deflated.pth", "--stats", "--json").json["tensors"][0]["name"] == "a"


def test_a_deflated_archive_that_grows_out_of_bounds_is_refused_before_it_does(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.zeros(10_000_000)}, "plain.pth")
    repacked("plain.pth", "bomb.pth")
    assert Path("bomb.pth").stat().st_size < 100_000
    assert "MODELCLI_MAX_EXPANSION" in cli("params", "bomb.pth", code=4).err
    monkeypatch.setenv("MODELCLI_MAX_EXPANSION", "100000000")
    cli("check", "bomb.pth", "--finite")


@pytest.mark.parametrize("change", ["crc", "size", "bytes"])
def test_a_deflated_record_that_is_not_what_it_states(cli: Cli, folder: Path, change: str) -> None:
    torch.save({"w": torch.randn(1000)}, "plain.pth")
    repacked("plain.pth", "deflated.pth")
    data = bytearray(Path("deflated.pth").read_bytes())
    with zipfile.ZipFile("deflated.pth") as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
        central = data.rindex(info.filename.encode()) - 46
    if change == "bytes":
        place = info.header_offset + 30 + len(info.filename) + info.compress_size // 2
        data[place] ^= 0xFF
    else:
        for start in (info.header_offset + 14, central + 16):
            data[start + (0 if change == "crc" else 8)] ^= 0x01
    Path("deflated.pth").write_bytes(data)
    error = cli("params", "deflated.pth", "--values", code=4).err
    assert "deflated.pth" in error


# --- pickles and programs --------------------------------------------------------------------------------------------


def pickled(value: Any, path: str, protocol: int) -> None:
    with Path(path).open("wb") as file:
        pickle.dump(value, file, protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_of_a_state_dict(cli: Cli, folder: Path, protocol: int) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    base = torch.arange(12.0).reshape(3, 4)
    state = {**net.state_dict(), "column": base[:, 1], "half": torch.ones(2).half(), "none": torch.empty(0, 3)}
    pickled({"model": state, "epoch": 3}, "in.pkl", protocol)
    assert shown(cli, "in.pkl") == {name: tensor.tolist() for name, tensor in state.items()}
    cli("check", "in.pkl", "--finite", "--safe")
    cli("save", "out.pth", "-m", "in.pkl")
    written = torch.load("out.pth", weights_only=True)
    assert written["epoch"] == 3
    assert all(torch.equal(written["model"][name], tensor) for name, tensor in state.items())
    cli("save", "out.safetensors", "-m", "in.pkl")
    pickled(net.state_dict(), "flat.pkl", protocol)
    cli("load", "flat.pkl", "--arch", "Sequential(Linear(2,3),BatchNorm1d(3))")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_arrays_by_name_as_detectron2_has_them(cli: Cli, folder: Path, protocol: int) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "conv.weight": rng.standard_normal((4, 3, 2)).astype("float32"),
        "conv.bias": np.zeros(4, "float16"),
        "turned": np.asfortranarray(rng.standard_normal((3, 5))),
        "count": np.array(7),
        "mask": np.array([True, False]),
        "wave": np.array([1 + 2j], "complex64"),
        "empty": np.zeros((0, 2), "int16"),
    }
    pickled({"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}, "R-50.pkl", protocol)
    found = cli("params", "R-50.pkl", "--json").json["tensors"]
    assert {row["name"]: (row["shape"], row["dtype"]) for row in found} == {
        name: (list(array.shape), str(array.dtype)) for name, array in arrays.items()
    }
    cli("check", "R-50.pkl", "--finite", "--safe")
    cli("save", "out.pth", "-m", "R-50.pkl")
    written = torch.load("out.pth", weights_only=True)
    assert written["__author__"] == "Caffe2"
    for name, array in arrays.items():
        assert np.array_equal(written["model"][name].numpy(), array), name
    pickled(arrays, "flat.pkl", protocol)
    cli("rename", "conv.**", "stem.**", "-m", "flat.pkl", "-o", "renamed.pth")
    assert "stem.weight" in torch.load("renamed.pth", weights_only=True)


def test_arrays_that_python_2_pickled(cli: Cli, folder: Path) -> None:
    """Its strings and an array's data are bytes. The pickle is written by hand, like detectron2's first files."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    data = np.array([1.5, -2.0], "float32").tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
        b"(K\x01K\x02\x85cnumpy\ndtype\n(" + text(b"f4") + b"K\x00K\x01tR(K\x03" + text(b"<") + b"NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89" + text(data) + b"tb"
    )
    Path("old.pkl").write_bytes(b"\x80\x02}" + text(b"blobs") + b"}" + text(b"w") + array + b"ss.")
    with Path("old.pkl").open("rb") as file:
        theirs = pickle.load(file, encoding="latin1")
    assert shown(cli, "old.pkl", "--key", "blobs") == {"w": theirs["blobs"]["w"].tolist()}


def test_a_plain_pickle_that_calls_something_is_shown_and_not_saved(cli: Cli, folder: Path) -> None:
    pickled({"model": linear(), "x": Calls(os.system, "touch ran")}, "in.pkl", 4)
    assert "posix.system" in cli("params", "in.pkl").err
    cli("check", "in.pkl", "--safe", code=1)
    cli("save", "out.pth", "-m", "in.pkl", code=3)
    cli("save", "out.pth", "-m", "in.pkl", "--tensors-only")
    assert not Path("ran").exists()


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95])
def test_a_plain_pickle_that_is_cut_off(cli: Cli, folder: Path, cut: float) -> None:
    for value in (linear(), {"a": np.ones(9)}):
        pickled(value, "in.pkl", 2)
        data = Path("in.pkl").read_bytes()
        Path("in.pkl").write_bytes(data[: int(len(data) * cut)])
        cli("params", "in.pkl", code=4)
        Path("in.pkl").write_bytes(data + b"x")
        cli("params", "in.pkl", code=4)


class Scripted(nn.Module):
    """A module with a shared child, a buffer, a tensor that is not a buffer, and children in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.again = self.first
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))])
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.plain = torch.ones(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x * self.scale + self.plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["script", "trace"])
def test_a_torchscript_archive_is_shown_and_converted(cli: Cli, folder: Path, way: str) -> None:
    net = Scripted().eval()
    made: Any = torch.jit.script(net) if way == "script" else torch.jit.trace(net, torch.ones(4, 2))
    made.save("program.pt")
    theirs = torch.jit.load("program.pt").state_dict()
    assert shown(cli, "program.pt") == {name: tensor.tolist() for name, tensor in theirs.items()}
    rows = {row["name"]: row["kind"] for row in cli("params", "program.pt", "--json").json["tensors"]}
    assert rows["scale"] == "buffer"
    assert rows["blocks.0.0.weight"] == "parameter"
    assert "does not run its code" in cli("params", "program.pt").err
    cli("check", "program.pt", "--safe", code=1)
    cli("save", "out.pth", "-m", "program.pt")
    net.load_state_dict(torch.load("out.pth", weights_only=True))
    cli("save", "out.safetensors", "-m", "program.pt")
    assert "--key" in cli("params", "program.pt", "--key", "x", code=2).err


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_is_shown_and_converted(cli: Cli, folder: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    program = torch.export.export(net, (torch.ones(4, 2),))
    torch.export.save(program, "program.pt2")
    assert shown(cli, "program.pt2") == {name: tensor.tolist() for name, tensor in program.state_dict.items()}
    rows = {row["name"]: row["kind"] for row in cli("params", "program.pt2", "--json").json["tensors"]}
    assert rows["1.running_mean"] == "buffer"
    cli("check", "program.pt2", "--safe", code=1)
    cli("save", "out.pth", "-m", "program.pt2")
    net.load_state_dict(torch.load("out.pth", weights_only=True))
    cli("load", "program.pt2", "--arch", "Sequential(Linear(2,3),BatchNorm1d(3))")


def test_many_arrays_of_one_text_are_made_of_it_once(cli: Cli, folder: Path) -> None:
    """A file of 2 MB would take 2 GB of memory if each array had its own copy."""
    count = 1_000_000
    shape = b"J" + count.to_bytes(4, "little")
    head = (
        b"\x80\x02X" + count.to_bytes(4, "little") + b"a" * count + b"q\x000"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x010cnumpy\nndarray\nq\x020"
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1K\x00K\x01tRq\x030}"
    )
    array = b"h\x01(h\x02K\x00\x85X\x01\x00\x00\x00btR(K\x01" + shape + b"\x85h\x03\x89h\x00tb"
    arrays = b"".join(b"X\x05\x00\x00\x00w%04d" % number + array + b"s" for number in range(2000))
    Path("many.pkl").write_bytes(head + arrays + b".")
    tracemalloc.start()
    assert cli("params", "many.pkl", "--json").json["tensors"][1999]["shape"] == [count]
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()
