"""A folder saved by transformers is a model: it opens with the keys of its modules, and is saved as a folder again."""

from __future__ import annotations

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
