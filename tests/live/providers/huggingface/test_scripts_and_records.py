"""A script for a model of transformers uses only transformers, and a file with such a model records how to build it."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import modelcli
from modelcli.language.references import Source
from modelcli.live.opening import open_live
from tests.conftest import Cli
from tests.live.providers.huggingface.tiny import loaded, model, saved

EDITS = {
    "BertForSequenceClassification": ["replace classifier Linear(_,10)", "freeze bert.embeddings"],
    "LlamaForCausalLM": ["remove model.layers.1", "freeze model.embed_tokens"],
    "ViTForImageClassification": ["replace classifier Linear(_,5)", "freeze vit"],
    "CLIPModel": ["freeze vision_model"],
}


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(found[key].dtype == expected[key].dtype for key in expected)


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_script_gives_the_tensors_that_save_writes(cli: Cli, folder: Path, name: str, dtype: torch.dtype) -> None:
    saved(name, folder / "model").to(dtype).save_pretrained(folder / "model")
    options = [word for line in EDITS[name] for word in ("-e", line)]
    cli("apply", "-m", "./model", *options, "-o", "saved.pth")
    (folder / "edit.py").write_text(script_of(cli, "./model", EDITS[name]))
    text = (folder / "edit.py").read_text()
    assert f'{name}.from_pretrained("./model")' in text
    assert "modelcli" not in text
    runpy.run_path("edit.py")
    same_tensors(torch.load("out.pth", weights_only=True), torch.load("saved.pth", weights_only=True))


def test_a_script_says_a_dtype_that_the_configuration_does_not_have(cli: Cli, folder: Path) -> None:
    model = saved("LlamaForCausalLM", folder / "model").to(torch.float16)
    model.save_pretrained(folder / "model")
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}))
    (folder / "edit.py").write_text(script_of(cli, "./model", []))
    assert "dtype=torch.float16" in (folder / "edit.py").read_text()
    runpy.run_path("edit.py")
    same_tensors(torch.load("out.pth", weights_only=True), model.state_dict())


@pytest.mark.parametrize("reference", ["./model", "./model(num_hidden_layers=1)"])
def test_a_script_without_weights_draws_the_values_of_save(cli: Cli, folder: Path, reference: str) -> None:
    saved("LlamaForCausalLM", folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    prefix = "hf:" if "(" in reference else ""
    cli("save", "saved.pth", "-m", f"{prefix}{reference}")
    (folder / "edit.py").write_text(script_of(cli, f"{prefix}{reference}", []))
    runpy.run_path("edit.py")
    same_tensors(torch.load("out.pth", weights_only=True), torch.load("saved.pth", weights_only=True))


def script_of(cli: Cli, reference: str, edits: list[str]) -> str:
    cli("load", reference, "--force")
    for line in edits:
        cli(*line.split())
    return cli("script").out


@pytest.mark.parametrize("name", EDITS)
def test_a_file_contains_the_configuration_and_needs_no_folder(cli: Cli, folder: Path, name: str) -> None:
    saved(name, folder / "model")
    options = [word for line in EDITS[name] for word in ("-e", line)]
    cli("apply", "-m", "./model", *options, "-o", "out.pth")
    before = modelcli.load("out.pth")
    shutil.rmtree(folder / "model")
    found = modelcli.load("out.pth")
    assert type(found).__name__ == name
    same_tensors(found.state_dict(), torch.load("out.pth", weights_only=True))
    same_tensors(dict(found.named_buffers()), dict(before.named_buffers()))
    frozen = {key for key, parameter in found.named_parameters() if not parameter.requires_grad}
    assert frozen == {key for key, parameter in before.named_parameters() if not parameter.requires_grad}
    assert frozen
    if name == "LlamaForCausalLM":
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert len(found.model.layers) == 1
    shown = cli("summary", "out.pth", "--json").json
    assert shown["totals"]["params"] == sum(parameter.numel() for parameter in found.parameters())
    assert shown["layers"][0]["type"] == name


def test_load_gives_what_from_pretrained_gives(folder: Path) -> None:
    saved("LlamaForCausalLM", folder / "model").to(torch.bfloat16).save_pretrained(folder / "model")
    expected, _ = loaded(folder / "model")
    found: Any = modelcli.load("./model")
    same_tensors(found.state_dict(), expected.state_dict())
    same_tensors(dict(found.named_buffers()), dict(expected.named_buffers()))
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert not found.training
    with torch.no_grad():
        tokens = torch.tensor([[1, 2, 3]])
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


def test_a_class_with_values_that_name_code_is_refused(cli: Cli, folder: Path) -> None:
    """A record names a model in this form."""
    config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=100)
    reference = f"hf:LlamaForCausalLM(hidden_size={config.hidden_size}, attn_implementation='org/kernel')"
    assert "code of the Hub" in cli("params", reference, "--no-cache", code=3).err


def test_a_record_keeps_entries_that_only_a_configuration_has(cli: Cli, folder: Path) -> None:
    """Entries that transformers does not know are kept, because code may use them, and so are infinite numbers."""
    saved("LlamaForCausalLM", folder / "model")
    path = folder / "model" / "config.json"
    own = {"ep_size": 1, "limits": [0.0, {"__float__": "Infinity"}], "num_hiden_layers": 7}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    cli("save", "out.pth", "-m", "./model")
    found: Any = modelcli.load("out.pth")
    assert found.config.ep_size == 1
    assert found.config.limits == [0.0, float("inf")]
    assert len(found.model.layers) == 2


def test_a_misspelt_argument_is_an_error(cli: Cli, folder: Path) -> None:
    values = "hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=100, num_hiden_layers=1"
    told = cli("summary", f"hf:LlamaForCausalLM({values})", "--no-cache").err
    assert "has no 'num_hiden_layers'" in told
    assert "num_hidden_layers" in told


def test_a_wrong_value_of_a_class_is_a_request_error(cli: Cli, folder: Path) -> None:
    told = cli("params", "hf:LlamaForCausalLM(hidden_size='two')", "--no-cache", code=2).err
    assert "expected int" in told
    assert "config.json" not in told


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("LlamaForCausalLM", ("remove", "model.layers.0")),
        ("BertForSequenceClassification", ("replace", "classifier", "Linear(_,10)")),
        ("ViTForImageClassification", ("resize", ".", "image_size=64")),
        ("CLIPModel", ("resize", ".", "image_size=48")),
    ],
)
def test_a_script_lets_the_model_say_what_it_is_now(cli: Cli, folder: Path, name: str, edit: tuple[str, ...]) -> None:
    saved(name, folder / "model")
    cli(*edit, "-m", "./model", "-o", "out/")
    expected: Any = modelcli.load("out/")
    found: dict[str, Any] = {}
    exec(cli("script", "-e", " ".join(edit), "-m", "./model", "-o", "made.pth").out, found)
    model = found["model"]
    ignored = ("_name_or_path", "transformers_version", "architectures")
    values = [{k: v for k, v in each.config.to_dict().items() if k not in ignored} for each in (model, expected)]
    for each in values:
        for part in each.values():
            if isinstance(part, dict):
                part.pop("dtype", None)  # from_pretrained sets it in the parts as well
    assert values[0] == values[1]
    assert getattr(model, "num_labels", None) == getattr(expected, "num_labels", None)
    numbers = [[getattr(part, "layer_idx", None) for part in each.modules()] for each in (model, expected)]
    assert numbers[0] == numbers[1]
    states = [each.state_dict() for each in (model, expected)]
    assert states[0].keys() == states[1].keys()
    plain = [
        [
            {k: v for k, v in vars(part).items() if k[0] != "_" and k != "training" and isinstance(v, (int, tuple))}
            for part in each.modules()
        ]
        for each in (model, expected)
    ]
    assert plain[0] == plain[1]
    if edit[0] != "replace":  # nothing is drawn
        assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("BertForSequenceClassification", "bert"),
        ("BertForSequenceClassification", "bert.encoder"),
        ("LlamaForCausalLM", "model"),
        ("LlamaForCausalLM", "model.layers.1.self_attn"),
    ],
)
def test_an_extracted_part_runs_with_what_flowed_into_it(cli: Cli, folder: Path, name: str, path: str) -> None:
    """The truth is what flows into the part in a pass of the whole model, by a hook."""
    real = model(name).eval()
    real.save_pretrained(folder / "model")
    outputs: list[Any] = []
    real.get_submodule(path).register_forward_hook(lambda _part, _args, output: outputs.append(output))
    live = open_live(Source("./model"))
    assert live.inputs is not None
    with torch.no_grad():
        real(**live.inputs.tensors("cpu").kwargs)
    first = outputs[0][0]  # of a tuple, or of an output of transformers
    done = cli("extract", path, "-m", "./model", "-o", "out.safetensors", "--json").json
    assert done["check"]["ran"], done
    shown = json.dumps(done["check"]["output_shape"])
    assert json.dumps(list(first.shape)) in shown
    rows = cli("summary", "out.safetensors", "--json").json["layers"]
    assert json.dumps(rows[0]["output_shape"]) == shown
