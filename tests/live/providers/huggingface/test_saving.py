"""The folder of an edited model of transformers: its configuration contains the changes, or a note names them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import modelcli
from tests.conftest import Cli
from tests.live.providers.huggingface.tiny import loaded, saved

TOKENS = torch.tensor([[1, 2, 3, 4, 5]])


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def same_logits(one: nn.Module, other: nn.Module, **inputs: torch.Tensor) -> bool:
    """Whether two models give the same bits, as copies: kernels differ by the alignment of weights in memory."""
    one, other = copy.deepcopy(one), copy.deepcopy(other)
    with torch.no_grad():
        return torch.equal(one(**inputs).logits, other(**inputs).logits)


def test_a_replaced_head(cli: Cli, folder: Path) -> None:
    model = saved("BertForSequenceClassification", folder / "model")
    told = cli("replace", "classifier", "Linear(_,10)", "-m", "./model", "-o", "out/").err
    assert "config.json: num_labels: 3 -> 10" in told
    found, report = loaded(folder / "out")
    assert not any(report.values())
    assert found.config.num_labels == 10
    assert len(config_in(folder / "out")["id2label"]) == 10
    model.classifier = nn.Linear(32, 10)
    model.classifier.load_state_dict(found.classifier.state_dict())
    assert same_logits(found, model, input_ids=TOKENS)


def test_a_cast(cli: Cli, folder: Path) -> None:
    model = saved("LlamaForCausalLM", folder / "model")
    cli("cast", ".", "bfloat16", "-m", "./model", "-o", "out/")
    assert config_in(folder / "out")["dtype"] == "bfloat16"
    found, report = loaded(folder / "out")
    assert not any(report.values())
    assert found.dtype == torch.bfloat16
    assert same_logits(found, model.to(torch.bfloat16), input_ids=TOKENS)


def test_removed_layers_and_the_list_with_a_value_for_each(cli: Cli, folder: Path) -> None:
    config = transformers.Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    before = list(config.layer_types)
    assert len(set(before)) == 2
    cli("remove", "model.layers.[1-2]", "-m", "./model", "-o", "out/")
    found, report = loaded(folder / "out")
    assert not any(report.values())
    assert found.config.num_hidden_layers == 4
    assert found.config.layer_types == [before[number] for number in (0, 3, 4, 5)]
    model.model.layers = nn.ModuleList(model.model.layers[number] for number in (0, 3, 4, 5))
    model.config.num_hidden_layers = 4
    model.config.layer_types = found.config.layer_types
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        assert torch.equal(found(input_ids=TOKENS, use_cache=False).logits, expected)


@pytest.mark.parametrize("out", ["out/", "out.pth"])
def test_an_edited_model_that_is_loaded_saves_and_trains_as_its_folder_does(cli: Cli, folder: Path, out: str) -> None:
    saved("LlamaForCausalLM", folder / "layers", num_hidden_layers=6)
    cli("remove", "model.layers.[1-2]", "-m", "./layers", "-o", out)
    model = modelcli.load(out)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert model.model.config.num_hidden_layers == 4
    model.save_pretrained(folder / "again")
    found, report = loaded(folder / "again")
    assert not any(report.values())
    words = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.eval().generate(words, max_new_tokens=4), found.eval().generate(words, max_new_tokens=4))


def test_a_new_classifier_that_is_loaded_trains(cli: Cli, folder: Path) -> None:
    saved("BertForSequenceClassification", folder / "model")
    cli("replace", "classifier", "Linear(_,10)", "-m", "./model", "-o", "out/")
    model: Any = modelcli.load("out/")
    assert (model.num_labels, model.config.num_labels, len(model.config.id2label)) == (10, 10, 10)
    assert model(torch.tensor([[1, 2]]), labels=torch.tensor([9])).loss.isfinite()


def test_untied_embeddings(cli: Cli, folder: Path) -> None:
    """A new head is a tensor of its own, so the embeddings are not tied any more."""
    saved("LlamaForCausalLM", folder / "model")
    cli("replace", "lm_head", "Linear(_,_,bias=False)", "--untie", "-m", "./model", "-o", "out/")
    assert config_in(folder / "out")["tie_word_embeddings"] is False
    found, report = loaded(folder / "out")
    assert not any(report.values())
    assert found.lm_head.weight is not found.model.embed_tokens.weight
    state = modelcli.load("./out").state_dict()
    assert torch.equal(state["lm_head.weight"], found.lm_head.weight)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "ViTForImageClassification"])
def test_the_keys_are_those_that_save_pretrained_writes(cli: Cli, folder: Path, name: str) -> None:
    from safetensors.torch import load_file

    saved(name, folder / "model")
    cli("save", "out/", "-m", "./model")
    expected, found = (load_file(folder / each / "model.safetensors") for each in ("model", "out"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert config_in(folder / "out") == config_in(folder / "model")


def test_shards_and_their_index_are_named_as_save_pretrained_names_them(cli: Cli, folder: Path) -> None:
    saved("MixtralForCausalLM", folder / "model").save_pretrained(folder / "theirs", max_shard_size=100_000)
    cli("save", "out/", "-m", "./model", "--max-shard-size", "100KB")
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {path.name for path in (folder / "theirs").iterdir()}
    _, report = loaded(folder / "out")
    assert not any(report.values())


def test_other_files_are_copied_and_old_weights_are_not(cli: Cli, folder: Path) -> None:
    saved("LlamaForCausalLM", folder / "model")
    model = folder / "model"
    (model / "tokenizer.json").write_text("{}")
    (model / "README.md").write_text("about")
    for name in ("pytorch_model.bin", "tf_model.h5", "model.onnx", ".hidden"):
        (model / name).write_bytes(b"old")
    (model / "pytorch_model.bin").unlink()
    cli("freeze", "model", "-m", "./model", "-o", "out/")
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}


def test_folders_that_are_not_copied_are_named(cli: Cli, folder: Path) -> None:
    saved("BertForSequenceClassification", folder / "model")
    assert "copies files" not in cli("save", "first/", "-m", "./model").err
    (folder / "model" / "1_Pooling").mkdir()
    (folder / "model" / ".cache").mkdir()
    told = cli("save", "out/", "-m", "./model").err
    assert "modelcli copies files, and no folders: 1_Pooling in" in told
    assert {path.name for path in (folder / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_changes_that_a_configuration_cannot_express_are_noted_and_recorded(cli: Cli, folder: Path) -> None:
    saved("BertForSequenceClassification", folder / "model")
    head = "Sequential(Linear(32,16),ReLU(),Linear(16,3))"
    told = cli("replace", "classifier", head, "-m", "./model", "-o", "out/").err
    assert "config.json cannot say what classifier (Sequential in the place of Linear) is now" in told
    assert "Sequential" in cli("modules", "./out", "-s", "classifier").out
    model = modelcli.load("./out")
    assert isinstance(model.classifier, nn.Sequential)
    again = cli("freeze", "bert", "-m", "./out", "-o", "again/").err
    assert "cannot say" in again
    assert "dtype" not in again
    frozen = cli("params", "./again", "--frozen", "--json").json["tensors"]
    assert frozen
    assert all(row["name"].startswith("bert.") for row in frozen)


def test_changes_are_noted_once(cli: Cli, folder: Path) -> None:
    saved("BertForSequenceClassification", folder / "model")
    assert "num_labels: 3 -> 10" in cli("replace", "classifier", "Linear(_,10)", "-m", "./model", "-o", "one/").err
    told = cli("remove", "bert.encoder.layer.1", "-m", "./one", "-o", "two/").err
    assert "config.json: num_hidden_layers: 2 -> 1" in told
    assert "num_labels" not in told
    found, report = loaded(folder / "two")
    assert not any(report.values())
    assert (found.config.num_labels, found.config.num_hidden_layers) == (10, 1)


@pytest.mark.parametrize(
    ("name", "layer", "entry"),
    [
        ("CLIPModel", "text_model.encoder.layers.1", "text_config.num_hidden_layers"),
        ("CLIPModel", "vision_model.encoder.layers.1", "vision_config.num_hidden_layers"),
        ("LlavaForConditionalGeneration", "model.language_model.layers.1", "text_config.num_hidden_layers"),
    ],
)
def test_a_change_in_a_nested_configuration_is_noted(cli: Cli, folder: Path, name: str, layer: str, entry: str) -> None:
    saved(name, folder / "model")
    told = cli("remove", layer, "-m", "./model", "-o", "out/").err
    assert f"config.json: {entry}: 2 -> 1" in told
    assert not any(loaded(folder / "out")[1].values())


def test_a_note_says_that_from_pretrained_refuses_a_folder(cli: Cli, folder: Path) -> None:
    saved("GPT2LMHeadModel", folder / "model")
    told = cli("replace", "lm_head", "Linear(_,7,bias=False)", "--untie", "-m", "./model", "-o", "out/").err
    assert "from_pretrained refuses the weights" in told
    with pytest.raises(RuntimeError, match="mismatched"):
        loaded(folder / "out")
    assert modelcli.load("./out").lm_head.out_features == 7


def test_a_changed_configuration_takes_precedence_over_the_record(cli: Cli, folder: Path) -> None:
    saved("BertForSequenceClassification", folder / "model")
    cli("freeze", "bert", "-m", "./model", "-o", "out/")
    assert cli("summary", "./out", "--json").json["totals"]["trainable_params"] < 1000
    config = config_in(folder / "out")
    (folder / "out" / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.5}))
    told = cli("params", "./out", "--frozen", "--json")
    assert told.json["tensors"] == []
    assert told.json["notes"] == ["the record in out was ignored: config.json has changed since"]


def test_a_folder_is_replaced_in_one_step(cli: Cli, folder: Path) -> None:
    saved("LlamaForCausalLM", folder / "model")
    (folder / "model" / "tokenizer.json").write_text("{}")
    inode = (folder / "model").stat().st_ino
    cli("cast", ".", "bfloat16", "-m", "./model", "-o", "model/", code=2)  # without --force
    assert config_in(folder / "model")["dtype"] == "float32"
    cli("cast", ".", "bfloat16", "-m", "./model", "-o", "model/", "--force")
    assert (folder / "model").stat().st_ino != inode  # another folder replaced it in one step
    found, report = loaded(folder / "model")
    assert not any(report.values())
    assert found.dtype == torch.bfloat16
    assert (folder / "model" / "tokenizer.json").read_text() == "{}"


def test_an_extracted_plain_module_is_written_as_a_plain_folder_of_shards(cli: Cli, folder: Path) -> None:
    saved("LlamaForCausalLM", folder / "model")
    cli("extract", "model.layers.0.mlp", "-m", "./model", "-o", "out/")
    names = {path.name for path in (folder / "out").iterdir()}
    assert "config.json" not in names
    assert "model.safetensors.index.json" in names
