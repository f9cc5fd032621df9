"""`modelcli memory`: its options, its document, the largest batch, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Cli

MLP = "Sequential(Linear(100,200),ReLU(),Linear(200,10))"
PARAMS = 4 * (100 * 200 + 200 + 200 * 10 + 10)


def test_the_document_on_the_cpu_has_the_exact_bytes(cli: Cli) -> None:
    words = ("memory", MLP, "--input-size", "8,100", "--train", "sgd-momentum", "--device", "cpu", "--json")
    found = cli(*words).json
    assert found["input"] == [[8, 100]]
    assert (found["batch"], found["train"], found["amp"], found["loss"]) == (8, "sgd-momentum", None, "cross entropy")
    assert found["parts"]["params"] == found["parts"]["gradients"] == found["parts"]["optimizer"] == PARAMS
    assert sum(found["peak_parts"].values()) == found["peak_bytes"] == found["total_bytes"]
    assert (found["peak_at"], found["peak_in"]) == ("0", "backward")
    assert found["margin_bytes"] == 0
    assert found["largest_batch"] is None
    assert {row["path"]: row["param_bytes"] for row in found["modules"]}["2"] == 4 * (200 * 10 + 10)


def test_on_a_gpu_a_margin_is_stated(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    found = cli("memory", MLP, "--input-size", "8,100", "--train", "adamw", "--json").json
    assert found["cublas_bytes"] == 2 * (4096 * 2 + 16 * 8) * 1024  # one in the forward, one in the backward pass
    assert sum(found["peak_parts"].values()) == found["peak_bytes"]
    assert sum(found["margin"].values()) == found["margin_bytes"]
    assert found["total_bytes"] == found["peak_bytes"] + found["margin_bytes"]
    assert found["margin"]["workspaces"] == 0  # no convolution
    inference = cli("memory", MLP, "--input-size", "8,100", "--json").json
    assert inference["cublas_bytes"] == (4096 * 2 + 16 * 8) * 1024
    assert inference["train"] is None
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert cli("memory", MLP, "--input-size", "8,100", "--json").json["cublas_bytes"] == 0


def test_gradients_are_as_large_as_the_parameters(cli: Cli) -> None:
    """However the allocator splits its blocks: `parts` are rounded to 512 bytes alone."""
    found = cli("memory", "resnet18", "--train", "sgd-momentum", "--json").json
    assert found["parts"]["gradients"] == found["parts"]["optimizer"] == found["parts"]["params"]
    assert found["parts"]["params"] % 512 == 0


def test_a_recipe_with_a_frozen_backbone_takes_less(cli: Cli) -> None:
    words = ("memory", "--train", "adamw", "--device", "cpu", "--json")
    cli("load", MLP)
    whole = cli(*words, "--input-size", "8,100").json
    cli("freeze", "0")
    frozen = cli(*words, "--input-size", "8,100").json
    assert frozen["parts"]["optimizer"] == 2 * 4 * (200 * 10 + 10)
    assert whole["parts"]["optimizer"] == 2 * PARAMS
    assert frozen["peak_bytes"] < whole["peak_bytes"]
    cli("freeze", "2")
    error = cli(*words, "--input-size", "8,100", code=2).error
    assert "frozen" in error["message"]


def test_a_cast_model_takes_half(cli: Cli) -> None:
    words = ("memory", MLP, "--input-size", "8,100", "--device", "cpu", "--json")
    found = cli(*words, "--dtype", "bfloat16").json
    assert found["parts"]["params"] == PARAMS // 2
    assert found["peak_bytes"] == cli(*words).json["peak_bytes"] // 2


@pytest.mark.parametrize("train", [(), ("--train", "adamw")])
def test_the_largest_batch_fits_and_the_next_does_not(train: tuple[str, ...], cli: Cli) -> None:
    words = ("memory", MLP, "--input-size", "1,100", "--device", "cpu", "--json", *train)
    room = 2_000_000
    largest = cli(*words, "--fits", room).json
    batch = largest["largest_batch"]
    assert largest["batch"] == batch > 100
    assert largest["total_bytes"] <= room
    assert cli(*words, "--batch", batch).json["total_bytes"] == largest["total_bytes"]
    assert cli(*words, "--batch", batch + 1).json["total_bytes"] > room


def test_where_nothing_fits_it_says_why(cli: Cli) -> None:
    words = ("memory", MLP, "--input-size", "1,100", "--device", "cpu", "--train", "adamw")
    assert cli(*words, "--fits", "100KB", "--json").json["largest_batch"] == 0
    fixed = cli(*words, "--fits", "100KB").err
    assert "what no batch changes" in fixed
    assert f"{4 * PARAMS / 1e6:.2f} MB" in fixed
    smallest = cli(*words, "--fits", "400KB").err
    assert "a batch of 1 takes" in smallest


def test_batch_norm_cannot_be_trained_on_one_value(cli: Cli) -> None:
    model = "Sequential(Linear(8,8),BatchNorm1d(8))"
    error = cli("memory", model, "--input-size", "1,8", "--train", "sgd", "--json", code=2).error
    assert "more than 1 value per channel" in error["message"]
    assert error["hint"] == "pass --batch 2"
    assert cli("memory", model, "--input-size", "1,8", "--train", "sgd", "--batch", "2", "--json").json["batch"] == 2
    found = cli("memory", model, "--input-size", "1,8", "--train", "sgd", "--fits", "50KB", "--device", "cpu", "--json")
    assert found.json["largest_batch"] > 2


def test_a_file_without_architecture_needs_one(cli: Cli, folder: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), "bare.pth")
    error = cli("memory", "bare.pth", "--json", code=2).error
    assert error["hint"] == "pass --arch REFERENCE"
    found = cli("memory", "bare.pth", "--arch", "Linear(3,2)", "--input-size", "4,3", "--device", "cpu", "--json").json
    assert found["parts"]["params"] == 4 * (3 * 2 + 2)


def test_a_written_checkpoint_brings_its_architecture_and_its_frozen_parameters(cli: Cli) -> None:
    cli("freeze", "0", "-m", MLP, "-o", "frozen.pth")
    found = cli("memory", "frozen.pth", "--input-size", "8,100", "--train", "sgd", "--device", "cpu", "--json").json
    assert found["parts"]["params"] == PARAMS
    assert found["parts"]["gradients"] == 4 * (200 * 10 + 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", "lion"), "unknown optimizer 'lion'"),
        (("--amp", "int8"), "autocast casts to bfloat16 or float16, not 'int8'"),
        (("--dtype", "int8"), "not in int8"),
        (("--dtype", "float8_e4m3fn"), "not in float8_e4m3fn"),
        (("--batch", str(10**18)), "which no tensor can hold"),
        (("--batch", str(10**30)), "which no tensor can hold"),
        (("--fits", "900TB"), "modelcli tries none above"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--checkpointing",), "inference has none"),
        (("--checkpointing", "--train", "sgd"), "finds no blocks"),
        (("--context", "8"), "--context is for models that take tokens"),
        (("--input-size", "8,99"), "[8,99] float32 flows in"),
    ],
)
def test_what_it_refuses(options: tuple[str, ...], message: str, cli: Cli) -> None:
    size = () if "--input-size" in options else ("--input-size", "8,100")
    assert message in cli("memory", MLP, *size, *options, "--json", code=2).error["message"]


def test_the_table_of_modules_begins_with_those_that_keep_most(cli: Cli) -> None:
    words = ("memory", MLP, "--input-size", "8,100", "--train", "sgd", "--device", "cpu", "--top", "2")
    lines = cli(*words).out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert any(line.startswith("Activations kept") for line in lines)


@pytest.fixture
def llama(folder: Path) -> str:
    """A folder with the configuration of a small causal language model: 2 layers, 2 heads of keys of 16 numbers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained("llama")
    return "llama"


def test_keys_and_values_grow_with_the_context(llama: str, cli: Cli) -> None:
    words = ("memory", llama, "--weights", "none", "--batch", "3", "--json")
    for length in (7, 40):
        found = cli(*words, "--context", length).json
        assert found["input"][0] == [3, length]
        assert found["kv_cache_bytes"] == 2 * 2 * 3 * 2 * length * 16 * 4  # layers, keys and values, batch, heads, ...
    half = cli(*words, "--context", "40", "--dtype", "bfloat16").json
    assert half["kv_cache_bytes"] == 2 * 2 * 3 * 2 * 40 * 16 * 2
    assert cli("memory", MLP, "--input-size", "8,100", "--json").json["kv_cache_bytes"] is None


def test_a_library_turns_checkpointing_on_itself(llama: str, cli: Cli) -> None:
    words = ("memory", llama, "--weights", "none", "--train", "adamw", "--batch", "4", "--context", "64", "--json")
    plain, saving = cli(*words).json, cli(*words, "--checkpointing").json
    assert saving["checkpointed"] == ["."]
    assert saving["parts"]["activations"] < plain["parts"]["activations"] / 2
    assert saving["parts"]["params"] == plain["parts"]["params"]
    half = cli(*words, "--checkpointing", "--amp", "bfloat16").json
    assert half["parts"]["activations"] < plain["parts"]["activations"] / 2


RECURRENT = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.LSTM(8, 16, batch_first=True)
        self.head = torch.nn.Linear(16, 2)
    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])
class Deciding(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x
"""


def test_it_says_what_it_does_not_know_about_an_lstm(folder: Path, cli: Cli) -> None:
    Path("own.py").write_text(RECURRENT)
    words = ("memory", "own.py:Net", "--input-size", "4,5,8", "--train", "sgd")
    assert "cuDNN runs LSTM" in cli(*words).err
    assert "cuDNN" not in cli(*words, "--device", "cpu").err


def test_a_model_that_needs_values_is_refused(folder: Path, cli: Cli) -> None:
    Path("own.py").write_text(RECURRENT)
    error = cli("memory", "own.py:Deciding(3,3)", "--input-size", "4,3", "--json", code=2).error
    assert error["message"].startswith("no step can be made without values")
    assert "own.py:12" in error["message"]


def test_autocast_of_the_cpu_has_its_own_lists(cli: Cli) -> None:
    words = ("memory", "Sequential(Linear(64,64),LayerNorm(64))", "--input-size", "32,64", "--train", "sgd", "--json")
    gpu, cpu = (cli(*words, "--amp", "bfloat16", "--device", device).json for device in ("cuda", "cpu"))
    assert gpu["parts"]["activations"] > cpu["parts"]["activations"]  # on CUDA LayerNorm casts to float32
