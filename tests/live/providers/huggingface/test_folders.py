"""A folder saved by transformers is a model: it opens with the keys of its modules, and is saved as a folder again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.conftest import Cli
from tests.live.providers.huggingface.tiny import MODELS, loaded, saved


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_opens_with_the_keys_and_values_that_from_pretrained_gives(cli: Cli, folder: Path, name: str) -> None:
    expected = saved(name, folder / "model").state_dict()
    cli("save", "out.pth", "-m", "./model")
    found = torch.load("out.pth", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_out_as_one_that_from_pretrained_loads(cli: Cli, folder: Path, name: str) -> None:
    expected = saved(name, folder / "model").state_dict()
    (folder / "model" / "tokenizer.json").write_text("{}")
    cli("save", "out/", "-m", "./model")
    found, report = loaded(folder / "out")
    assert not any(report.values())
    state = found.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert (folder / "out" / "tokenizer.json").read_text() == "{}"


def test_of_two_files_of_weights_safetensors_is_taken_as_from_pretrained_does(cli: Cli, folder: Path) -> None:
    expected = saved("LlamaForCausalLM", folder / "model").state_dict()
    torch.save({key: value + 1 for key, value in expected.items()}, folder / "model" / "pytorch_model.bin")
    cli("save", "out.pth", "-m", "./model")
    found = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("auto_class", ["AutoModel", '"AutoModel"'])
def test_an_auto_class_chooses_the_class(cli: Cli, folder: Path, auto_class: str) -> None:
    saved("BertForSequenceClassification", folder / "model")
    expected = transformers.AutoModel.from_pretrained(folder / "model").state_dict()
    cli("save", "out.pth", "-m", f"hf:./model(auto_class={auto_class})")
    found = torch.load("out.pth", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_unknown_auto_class_is_refused_with_the_nearest(cli: Cli, folder: Path) -> None:
    saved("BertForSequenceClassification", folder / "model")
    told = cli("summary", "hf:./model(auto_class=AutoModell)", code=2).err
    assert "transformers has no auto class 'AutoModell'" in told
    assert "did you mean AutoModel" in told


def test_an_argument_that_the_configuration_does_not_have_is_refused(cli: Cli, folder: Path) -> None:
    saved("BertForSequenceClassification", folder / "model")
    told = cli("summary", "hf:./model(num_lables=3)", code=2).err
    assert "the configuration of ./model has no 'num_lables'" in told
    assert "did you mean num_labels" in told


def test_weights_that_an_argument_gives_other_shapes_are_named(cli: Cli, folder: Path) -> None:
    saved("BertForSequenceClassification", folder / "model")
    told = cli("summary", "hf:./model(num_labels=7)").err
    assert "modelcli does not load classifier.bias, classifier.weight, which these arguments give other shapes" in told


def printed(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What transformers would have logged for the user to see."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]


@pytest.mark.parametrize(
    "words",
    [
        ("params", "hf:./model(num_labels=7)"),
        ("summary", "hf:./model(num_labels=7)"),
        ("save", "out/", "-m", "hf:./model(num_labels=7)"),
        ("save", "out.pth", "-m", "hf:./model(num_labels=7)"),
        ("script", "-m", "hf:./model(num_labels=7)"),
        ("cast", ".", "bfloat16", "-m", "hf:./model(num_labels=7)", "-o", "out/"),
    ],
)
def test_other_labels_are_told_once_and_by_a_note(
    cli: Cli, folder: Path, caplog: pytest.LogCaptureFixture, words: tuple[str, ...]
) -> None:
    saved("BertForSequenceClassification", folder / "model")
    caplog.clear()
    told = cli(*words).err
    assert "note: num_labels=7 leaves out the names of the 3 classes that ./model tells apart" in told
    assert "[transformers]" not in told
    assert not printed(caplog)


def test_what_transformers_says_of_a_configuration_is_a_note(
    cli: Cli, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved("LlamaForCausalLM", folder / "model")
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 128_001}))
    caplog.clear()
    told = cli("save", "out/", "-m", "./model").err
    assert "note: transformers says of the configuration of ./model: Model config: eos_token_id must be" in told
    assert told.count("eos_token_id") == 1
    assert "[transformers]" not in told
    assert not printed(caplog)
