"""Folders of Hugging Face models with quantized weights: what transformers makes of them is the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modelcli.providers.huggingface import HuggingFace
from tests.conftest import Cli
from tests.live.providers.huggingface.tiny import loaded

State = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
DEEPSEEK = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


def fp8(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 100).to(E4M3)


def saved(
    folder: Path, described: Mapping[str, Any], quantize: Any, name: str = "Llama", **values: Any
) -> tuple[dict[str, Any], State]:
    """Save a small model in two shards, with what `quantize` makes of the weights of projections, and a tokenizer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "num_hidden_layers": 2, **(LLAMA if name == "Llama" else DEEPSEEK), **values}
    config = getattr(transformers, f"{name}Config")(**sizes, dtype="bfloat16")
    getattr(transformers, f"{name}ForCausalLM")(config).bfloat16().save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state: State = {}
    for key, value in plain.items():
        state |= quantize(key, value) if key.endswith("proj.weight") else {key: value}
    keys, shards = list(state), dict[str, str]()
    for number, own in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({key: state[key].contiguous() for key in own}, folder / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "quantization_config": described}, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    return document, state


def blocks(rows: int, columns: int) -> Any:
    def quantize(key: str, value: torch.Tensor) -> State:
        scale = torch.rand(-(-value.shape[0] // rows), -(-value.shape[1] // columns)) * 0.01 + 1e-3
        return {key: (value.float() * 100).to(E4M3), f"{key}_scale_inv": scale}

    return quantize


def of_blocks(rows: int, columns: int) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [rows, columns]}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize(
    ("name", "block", "dtype"),
    [("Llama", (16, 32), "bfloat16"), ("Llama", (32, 16), "float32"), ("DeepseekV3", (16, 16), "bfloat16")],
)
def test_the_model_that_transformers_dequantizes(
    cli: Cli, folder: Path, name: str, block: tuple[int, int], dtype: str
) -> None:
    """Not blocks of 128: the size is that of the configuration."""
    document, state = saved(folder / "model", of_blocks(*block), blocks(*block), name)
    told = cli("dequantize", ".", dtype, "-m", "model/", "-o", "out/", "--max-shard-size", "30kB").err
    assert "config.json: quantization_config removed" in told
    assert json.loads((folder / "out" / "config.json").read_text()) == {**document, "dtype": dtype}
    assert (folder / "out" / "tokenizer.json").read_bytes() == (folder / "model" / "tokenizer.json").read_bytes()
    assert len([*(folder / "out").glob("model-*.safetensors")]) > 1
    given = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=given, dtype=getattr(torch, dtype)
    )
    found, report = loaded(folder / "out")
    assert not any(report.values())
    assert found.dtype == getattr(torch, dtype)
    same(found.state_dict(), wanted.state_dict())
    cli("check", "out/", "--complete", "--arch-check", "--finite")
    assert "model.layers.0" in cli("modules", "out/").out
    assert any(value.dtype == E4M3 for value in state.values())


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_fp8_of_compressed_tensors(cli: Cli, folder: Path, strategy: str) -> None:
    """Its formula: elements and scale in the dtype of the scale, multiplied: that is rounded once, as bfloat16."""

    def quantize(key: str, value: torch.Tensor) -> State:
        scale = (torch.rand((1,) if strategy == "tensor" else (value.shape[0], 1)) * 0.01 + 1e-3).bfloat16()
        return {key: (value.float() * 100).to(E4M3), f"{key}_scale": scale, f"{key[:-6]}input_scale": torch.ones(1)}

    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    described = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    document, state = saved(folder / "model", described, quantize)
    cli("dequantize", ".", "bfloat16", "-m", "model/", "-o", "out/")
    assert json.loads((folder / "out" / "config.json").read_text()) == document
    wanted = {
        key: value.to(state[f"{key}_scale"].dtype) * state[f"{key}_scale"] if f"{key}_scale" in state else value
        for key, value in state.items()
        if not key.endswith("_scale")
    }
    same(load_file(folder / "out" / "model.safetensors"), wanted)
    _, report = loaded(folder / "out")
    assert not any(report.values())


def test_the_hint_of_cast_gives_a_folder_that_loads(cli: Cli, folder: Path) -> None:
    saved(folder / "model", of_blocks(16, 16), blocks(16, 16))
    told = " ".join(cli("cast", ".", "half", "-m", "model/", "-o", "out/", code=2).err.split())
    assert "hint: apply the scales first: dequantize . float16" in told
    line = told.partition("apply the scales first: ")[2].partition(" note:")[0]
    cli(*line.split(), "-m", "model/", "-o", "out/")
    found, report = loaded(folder / "out")
    assert not any(report.values())
    assert found.dtype == torch.float16


def test_a_part_of_the_model(cli: Cli, folder: Path) -> None:
    """The configuration lists the modules whose weights are not quantized any more, so transformers reads both."""
    saved(folder / "model", of_blocks(16, 16), blocks(16, 16))
    cli("dequantize", "model.layers.0.mlp", "bfloat16", "-m", "model/", "-o", "out/")
    described = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    skipped = [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert described == {**of_blocks(16, 16), "modules_to_not_convert": skipped}
    cli("dequantize", ".", "bfloat16", "-m", "model/", "-o", "all/")
    cli("dequantize", ".", "bfloat16", "-m", "out/", "-o", "both/")
    same(load_file(folder / "both" / "model.safetensors"), load_file(folder / "all" / "model.safetensors"))
    given = transformers.FineGrainedFP8Config(**{**described, "dequantize": True})
    found = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", quantization_config=given)
    same(found.state_dict(), loaded(folder / "all")[0].state_dict())


def test_other_edits_of_its_keys(cli: Cli, folder: Path) -> None:
    """Everything that needs keys alone works on such a folder, and a note says what the configuration lacks."""
    _, state = saved(folder / "model", of_blocks(16, 16), blocks(16, 16))
    assert "float8_e4m3fn" in cli("params", "model/").out
    cli("check", "model/", "--finite", "--complete")
    assert cli("hash", "model/", "--json").json["tensors"] == len(state)
    told = cli("remove", "model.layers.1", "-m", "model/", "-o", "out/").err
    assert "config.json is not changed for edits of keys" in told
    assert "quantization_config" in json.loads((folder / "out" / "config.json").read_text())
    cli("load", "model/")
    cli("dequantize", ".", "bfloat16")
    cli("save", "out2/")
    assert not any(loaded(folder / "out2")[1].values())


def _packed(key: str, value: torch.Tensor, *names: str) -> State:
    path = key.removesuffix("weight")
    found = {f"{path}{names[0]}": torch.ones(value.shape[0], value.shape[1] // 8, dtype=torch.int32)}
    return found | {f"{path}{name}": torch.ones(value.shape[0], 4, dtype=torch.float16) for name in names[1:]}


METHODS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, lambda k, v: _packed(k, v, "qweight", "scales"), "GPTQ"),
    "awq": ({"quant_method": "awq", "bits": 4}, lambda k, v: _packed(k, v, "qweight", "scales"), "AWQ"),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda k, v: {k: torch.ones(v.numel() // 2, 1, dtype=torch.uint8), f"{k}.absmax": torch.ones(8)},
        "bitsandbytes",
    ),
    "bitsandbytes8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda k, v: {k: v.to(torch.int8), f"{k[:-6]}SCB": torch.ones(v.shape[0])},
        "bitsandbytes",
    ),
    "mxfp4": (
        {"quant_method": "mxfp4"},
        lambda k, v: {
            f"{k[:-7]}_blocks": torch.ones(v.shape[0], v.shape[1] // 32, 16, dtype=torch.uint8),
            f"{k[:-7]}_scales": torch.ones(v.shape[0], v.shape[1] // 32, dtype=torch.uint8),
            f"{k[:-7]}_bias": torch.ones(v.shape[0]),
        },
        "MXFP4",
    ),
    "pack": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda k, v: _packed(k, v, "weight_packed", "weight_scale"),
        "compressed-tensors (pack-quantized)",
    ),
    "aqlm": ({"quant_method": "aqlm"}, lambda k, v: _packed(k, v, "codes", "codebooks"), "AQLM"),
    "hqq": ({"quant_method": "hqq"}, lambda k, v: _packed(k, v, "W_q", "scale", "zero"), "HQQ"),
    "unknown": ({"quant_method": "my-own"}, lambda k, v: _packed(k, v, "packed", "factors"), "my-own"),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_it_names_and_does_not_know(cli: Cli, folder: Path, method: str) -> None:
    described, quantize, name = METHODS[method]
    saved(folder / "model", described, quantize, num_hidden_layers=1)
    told = " ".join(cli("dequantize", ".", "bfloat16", "-m", "model/", "-o", "out/", code=2).err.split())
    assert f"is quantized by {name}, which dequantize does not know: it knows fp8 elements times one scale" in told
    assert "dequantize it with the program that wrote it" in told
    told = " ".join(cli("cast", ".", "float32", "-m", "model/", "-o", "out/", code=2).err.split())
    if method != "mxfp4":  # its scales are bytes, which no cast touches
        assert "would change the weights" in told
    assert "or dequantize the file with the program that wrote it" in told
    assert not (folder / "out").exists()
    assert f"are quantized ({name})" in " ".join(cli("params", "model/").err.split())


def test_a_configuration_whose_weights_are_not_quantized(cli: Cli, folder: Path) -> None:
    """The live model is opened as before: bfloat16 weights fit the class."""
    saved(folder / "model", of_blocks(16, 16), lambda key, value: {key: value})
    assert "LlamaForCausalLM" in cli("modules", "model/").out


def test_a_part_of_a_configuration_may_state_the_quantization(cli: Cli, folder: Path) -> None:
    """Models of text and images have it in `text_config`; both dtypes follow, and the file of ModelOpt goes."""
    (folder / "model").mkdir()
    save_file({"a.weight": fp8(4, 4), "a.weight_scale": torch.ones(1)}, folder / "model" / "model.safetensors")
    text = {"torch_dtype": "bfloat16", "quantization_config": of_blocks(2, 2)}
    document = {"model_type": "llava", "torch_dtype": "bfloat16", "text_config": text, "vision_config": {"dtype": "x"}}
    (folder / "model" / "config.json").write_text(json.dumps(document))
    (folder / "model" / "hf_quant_config.json").write_text("{}")
    told = cli("dequantize", ".", "half", "-m", "model/", "-o", "out/").err
    assert "config.json: text_config.quantization_config removed" in told
    assert "hf_quant_config.json is left out" in told
    found = json.loads((folder / "out" / "config.json").read_text())
    wanted = {"torch_dtype": "float16"}
    assert found == {**document, **wanted, "text_config": wanted}
    assert {path.name for path in (folder / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_neither_torch_nor_transformers_is_needed(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers is not installed the folder is the same; a model of the Hub is one in its cache."""
    saved(folder / "model", of_blocks(16, 16), blocks(16, 16))
    cli("dequantize", ".", "bfloat16", "-m", "model/", "-o", "out/")
    with monkeypatch.context() as patched:
        patched.setattr(HuggingFace, "is_installed", False)
        cli("dequantize", ".", "bfloat16", "-m", "model/", "-o", "without/")
    home = folder / "home" / "hub" / "models--org--name"
    (home / "snapshots").mkdir(parents=True)
    (folder / "model").rename(home / "snapshots" / ("a" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    program = (
        "import sys; from modelcli.cli.main import main\n"
        "code = main(['dequantize', '.', 'bfloat16', '-m', 'hf:org/name', '-o', 'hub/'])\n"
        "sys.exit(code or ('torch' in sys.modules) or ('transformers' in sys.modules))"
    )
    offline = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=offline, capture_output=True)
    files = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    for other in ("without", "hub"):
        found = {path.name: path.read_bytes() for path in (folder / other).iterdir()}
        assert found.keys() == files.keys()
        assert found["config.json"] == files["config.json"]
        same(load_file(folder / other / "model.safetensors"), load_file(folder / "out" / "model.safetensors"))
