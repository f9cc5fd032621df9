"""Every model type that `tiny` lists: what modelcli shows of a saved folder equals the model of transformers.

The truth is the model that transformers itself built and saved, and torch's `FlopCounterMode` on a pass of it on the
CPU, whose attention is computed as matrix products: the fused kernels of the CPU are not counted by it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import modelcli
from modelcli.language.references import Source
from modelcli.live import planning, trace
from modelcli.live.opening import Live, open_live
from modelcli.model.blueprint import Blueprint
from tests.conftest import Cli
from tests.live.providers.huggingface import tiny
from tests.live.providers.huggingface.tiny import MODELS, MORE_MODELS, model
from tests.sampling import sampled

NAMES = [*MODELS, *MORE_MODELS]

#: The models whose forward pass is made on the CPU, because it looks into its inputs.
ON_THE_CPU = {
    "DebertaV2ForSequenceClassification": "its relative attention is a TorchScript function that computes a scale",
    "LayoutLMForTokenClassification": "it checks that the boxes lie on the page",
}
#: The operators that multiply and are not counted, neither by modelcli nor by torch: a Fourier transform.
UNCOUNTED = {"FNetForMaskedLM": ("aten::_fft_c2c",)}


def test_enough_model_types_are_covered_and_few_need_the_cpu() -> None:
    assert len(NAMES) >= 60
    assert set(ON_THE_CPU) < set(NAMES)
    assert len(ON_THE_CPU) <= 2


@pytest.mark.parametrize("name", sampled(NAMES, one_in=10))
def test_a_folder_equals_the_model_of_transformers(cli: Cli, folder: Path, name: str) -> None:
    real = model(name)
    save(real, folder / "model", ("safetensors", "shards", "bin")[NAMES.index(name) // 3 % 3])
    live = open_live(Source("./model"))
    found = planning.traced(live, with_values=True)
    assert live.report is not None
    assert live.report.is_strict
    same_tensors(found, real)
    same_pass(found, live, real, "cpu" if name in ON_THE_CPU else "meta")
    same_values(modelcli.load("./model"), real)
    cli("save", "out.pth", "-m", "./model")
    shutil.rmtree(folder / "model")
    same_values(modelcli.load("out.pth"), real)


#: Models with tensors that stay in float32: rotary frequencies, those that the class lists, and those created in it.
STAY_IN_FLOAT32 = ("LlamaForCausalLM", "T5ForConditionalGeneration", "DeepseekV3ForCausalLM")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in STAY_IN_FLOAT32 else pytest.mark.sweep) for name in NAMES]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_folder_gives_the_dtypes_that_from_pretrained_gives(
    cli: Cli, folder: Path, name: str, dtype: str
) -> None:
    model(name).save_pretrained(folder / "model")
    cli("cast", ".", dtype, "-m", "./model", "-o", "out/", "--check", "none")
    real, _ = tiny.loaded(folder / "out")
    assert real.dtype == getattr(torch, dtype)
    same_values_and_dtypes(modelcli.load("out/"), real)
    real.save_pretrained(folder / "theirs")
    same_values_and_dtypes(modelcli.load("theirs/"), tiny.loaded(folder / "theirs")[0])


@pytest.mark.parametrize("out", ["out/", "out.safetensors"])
def test_what_is_shown_of_a_cast_model_is_what_is_loaded(cli: Cli, folder: Path, out: str) -> None:
    """Rotary frequencies are in no file, and the loaded model has them in float32."""
    model("LlamaForCausalLM").save_pretrained(folder / "model")
    cli("cast", ".", "bfloat16", "-m", "./model", "-o", out)
    loaded = modelcli.load(out)
    expected = {
        name: str(value.dtype).removeprefix("torch.")
        for name, value in [*loaded.named_parameters(), *loaded.named_buffers()]
    }
    assert sorted(set(expected.values())) == ["bfloat16", "float32"]
    for words in (("params", out), ("params", out, "--no-cache")):
        found = {row["name"]: row["dtype"] for row in cli(*words, "--json").json["tensors"]}
        assert expected.items() <= found.items()
    changed = {row["name"] for row in cli("diff", "./model", out, "--json", code=1).json["tensors"]}
    assert changed
    assert not changed & dict(loaded.named_buffers()).keys()
    assert cli("check", out, "--max-bytes", "1MB").err == ""  # the model that is built is the one that was recorded


def test_a_cast_and_one_back_leave_the_rotary_frequencies_as_they_are(cli: Cli, folder: Path) -> None:
    model("LlamaForCausalLM").save_pretrained(folder / "model")
    cli("cast", ".", "bfloat16", "-m", "./model", "-o", "half/")
    cli("cast", ".", "float32", "-m", "./half", "-o", "out/")
    same_values_and_dtypes(modelcli.load("out/"), tiny.loaded(folder / "out")[0])


def same_values_and_dtypes(loaded: nn.Module, real: nn.Module) -> None:
    """Require equal dtypes and values of parameters and buffers, non-persistent ones included."""
    found, expected = (
        {**dict(each.named_parameters(remove_duplicate=False)), **dict(each.named_buffers(remove_duplicate=False))}
        for each in (loaded, real)
    )
    assert {name: value.dtype for name, value in found.items()} == {n: value.dtype for n, value in expected.items()}
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def same_tensors(found: Blueprint, real: nn.Module) -> None:
    """Require the names, shapes, dtypes, ties and totals of the saved model."""
    tensors = {
        **dict(real.named_parameters(remove_duplicate=False)),
        **dict(real.named_buffers(remove_duplicate=False)),
    }
    shown = {tensor.name: tensor for tensor in found.tensors}
    assert shown.keys() == tensors.keys()
    assert {name: (t.shape, t.dtype) for name, t in shown.items()} == {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()
    }
    assert ties({name: t.tied_to or name for name, t in shown.items()}) == ties({n: id(t) for n, t in tensors.items()})
    assert found.totals.params == sum(parameter.numel() for parameter in real.parameters())


def same_pass(found: Blueprint, live: Live, real: Any, device: str) -> None:
    """Require the output shapes and multiply-accumulates of a pass with values."""
    assert live.inputs is not None
    made = found.trace
    assert made is not None
    assert made.reason is None
    assert made.device == device
    assert made.uncounted == UNCOUNTED.get(type(real).__name__, ())
    real.set_experts_implementation("eager")  # a loop over the experts, each with the tokens that it gets
    real.requires_grad_(False)
    with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter, torch.no_grad():
        output = real(**live.inputs.tensors("cpu").kwargs)
    assert made.layers[""].output_shape == trace.shape_of(output)
    assert made.macs == counter.get_total_flops() // 2


def same_values(loaded: nn.Module, real: nn.Module) -> None:
    """Require that `modelcli.load` gives the values and ties of the saved model, non-persistent buffers included."""
    assert type(loaded) is type(real)
    values, expected = (
        dict(loaded.named_parameters(remove_duplicate=False)),
        real.named_parameters(remove_duplicate=False),
    )
    for key, value in expected:
        assert torch.equal(values[key], value), key
    buffers = dict(loaded.named_buffers())
    for key, buffer in real.named_buffers():
        assert torch.equal(buffers[key], buffer), key
    assert ties({key: id(value) for key, value in values.items()}) == ties(
        {key: id(value) for key, value in real.named_parameters(remove_duplicate=False)}
    )


def ties(identities: dict[str, Any]) -> set[frozenset[str]]:
    """The groups of names of one tensor."""
    groups: dict[Any, set[str]] = {}
    for name, identity in identities.items():
        groups.setdefault(identity, set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def save(real: Any, path: Path, how: str) -> None:
    """Save a model as one safetensors file, as many, or as the pickle that older versions of transformers wrote."""
    if how == "shards":
        largest = max(parameter.nbytes for parameter in real.parameters())
        real.save_pretrained(path, max_shard_size=largest + 1)
        assert (path / "model.safetensors.index.json").exists()
        return
    real.save_pretrained(path)
    if how == "bin":
        from safetensors.torch import load_file

        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()


def test_the_shapes_of_the_parts_of_an_output_are_shown(cli: Cli, folder: Path) -> None:
    model("LlamaForCausalLM").save_pretrained(folder / "model")
    rows = json.loads(cli("summary", "./model", "--json").out)["layers"]
    assert rows[0]["output_shape"] == {"logits": [1, 128, 100]}


@pytest.mark.parametrize("stated", [["input_ids=2,7"], ["input_ids=2,7:int32", "attention_mask=2,7"]])
def test_stated_inputs_replace_the_known_ones(cli: Cli, folder: Path, stated: list[str]) -> None:
    model("BertForSequenceClassification").save_pretrained(folder / "model")
    options = [word for text in stated for word in ("--input", text)]
    document = json.loads(cli("summary", "./model", "--json", *options).out)
    assert document["input"] == [[2, 7]] * len(stated)
    assert document["layers"][0]["output_shape"] == {"logits": [2, 3]}


def test_one_stated_input_keeps_the_others(cli: Cli, folder: Path) -> None:
    model("T5ForConditionalGeneration").save_pretrained(folder / "model")
    document = json.loads(cli("summary", "./model", "--json", "--input", "decoder_input_ids=1,5").out)
    assert document["input"] == [[1, 128], [1, 5]]
    assert document["layers"][0]["output_shape"]["logits"] == [1, 5, 100]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_an_input_that_no_part_of_the_model_takes_is_refused(cli: Cli, folder: Path, name: str) -> None:
    """`forward` has `**kwargs`, into which any name would go without a word."""
    model(name).save_pretrained(folder / "model")
    told = cli("summary", "./model", "--input", "nope=1,2", code=2).err
    assert f"forward of {name} has no argument 'nope'" in told
    assert "input_ids" in told
    assert "attention_mask" in cli("summary", "./model", "--input", "atention_mask=1,2", code=2).err
    cli("summary", "./model", "--input", "attention_mask=1,128")


def test_an_input_that_transformers_declares_is_taken(cli: Cli, folder: Path) -> None:
    """It goes through the `**kwargs` of the model to the attention of its layers."""
    model("LlamaForCausalLM").save_pretrained(folder / "model")
    cli("summary", "./model", "--input", "seq_idx=1,128:int64")
