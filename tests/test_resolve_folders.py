"""What the path of a folder with a library's model means, with the library installed and without."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from modelcli import installed
from tests.conftest import Cli
from tests.live.providers.huggingface.tiny import saved


def test_with_bare_keys_or_another_architecture_a_folder_is_a_checkpoint(cli: Cli, folder: Path) -> None:
    saved("ViTForImageClassification", folder / "model")
    keys = set(load_file(folder / "model" / "model.safetensors"))
    rows = cli("params", "./model", "--bare-keys", "--json").json["tensors"]
    assert {row["name"] for row in rows} == keys
    assert all(row["trainable"] is None for row in rows)
    assert "does not fit alexnet" in cli("load", "./model", "--arch", "alexnet", code=1).err
    cli("rename", "vit.**", "backbone.**", "-m", "./model", "--bare-keys", "-o", "out.safetensors")
    assert {key.replace("vit.", "backbone.", 1) for key in keys} == set(load_file("out.safetensors"))


def test_a_recipe_elsewhere_names_the_same_folder(cli: Cli, folder: Path) -> None:
    saved("BertForSequenceClassification", folder / "model")
    (folder / "recipes").mkdir()
    cli("load", "./model", "--recipe", "recipes/bert.toml")
    assert '"../model"' in (folder / "recipes" / "bert.toml").read_text()
    cli("freeze", "bert", "--recipe", "recipes/bert.toml")
    assert "BertModel" in cli("modules", "--recipe", "recipes/bert.toml", "-s", "bert").out


def test_a_note_reports_an_unreadable_configuration(cli: Cli, folder: Path) -> None:
    saved("BertForSequenceClassification", folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "bert"')
    shown = cli("params", "./model")
    assert "the configuration cannot be read: model/config.json is not valid JSON" in shown.err
    assert "bert.embeddings.word_embeddings.weight" in shown.out
    assert "cannot be read" in cli("freeze", "bert", "-m", "./model", "--dry-run").err


def test_without_the_library_the_keys_are_shown_and_a_note_says_what_to_install(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("BertForSequenceClassification", folder / "model")
    found = installed.folder
    monkeypatch.setattr(installed, "folder", lambda package: None if package == "transformers" else found(package))
    version = installed.version
    monkeypatch.setattr(installed, "version", lambda package: None if package == "transformers" else version(package))
    shown = cli("params", "./model")
    assert "pip install 'modelcli[hf]'" in shown.err
    assert "bert.embeddings.word_embeddings.weight" in shown.out
    assert "pip install 'modelcli[hf]'" in cli("freeze", "bert", "-m", "./model", "--dry-run").err
    told = cli("summary", "hf:BertForSequenceClassification(num_labels=2)", code=2).err
    assert "transformers is not installed" in told
    assert "pip install 'modelcli[hf]'" in told
