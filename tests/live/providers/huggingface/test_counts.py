"""Configurations that ask for thousands of layers are refused by their numbers, before anything is built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modelcli.providers import layer_counts
from tests.conftest import Cli
from tests.live.providers.huggingface.tiny import MODELS, MORE_MODELS

#: What the tiny models call the numbers of their layers.
COUNTS = {
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers"),
    *("decoder_layers", "decoder_num_hidden_layers", "depth", "num_hidden_groups", "inner_group_num"),
    *("num_conv_layers", "num_feat_extract_layers", "num_adapter_layers"),
}
#: The same as a list, a number for each stage.
LISTS = {"depths"}
#: A list for the layers one after another.
SIZES = {"conv_dim", "layer_types"}
#: Model types whose layers are those of their class, or of a model of timm.
WITHOUT_COUNTS = {"MobileViTForImageClassification", "TimmWrapperForImageClassification"}


def refuses(document: Mapping[str, Any]) -> str | None:
    return layer_counts.excess(document, 20_000)


def configuration(name: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        document: dict[str, Any] = getattr(transformers, name).config_class(**(MODELS | MORE_MODELS)[name]).to_dict()
    return document


def asking(
    document: Mapping[str, Any], count: int, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every place of a configuration and its parts that says how many layers there are, with a number in its place."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from asking(value, count, (*path, name))
        elif name in COUNTS and isinstance(value, int):
            yield (*path, name), count
        elif name in LISTS and value:
            yield (*path, name), [*value[:-1], count]
            yield (*path, name), [value[0]] * count
        elif name in SIZES and value:
            yield (*path, name), [value[0]] * count


def with_value(document: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    made = deepcopy(dict(document))
    at = made
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return made


@pytest.mark.parametrize("name", [name for name in MODELS | MORE_MODELS if name not in WITHOUT_COUNTS])
def test_each_count_of_each_model_type_is_bounded(name: str) -> None:
    document = configuration(name)
    assert refuses(document) is None
    places = list(asking(document, 20_000))
    assert places
    for path, value in places:
        assert "too many layers" in (refuses(with_value(document, path, value)) or ""), path


def test_no_configuration_of_transformers_comes_near() -> None:
    """Each model type as transformers makes it by default, which is how a published model is."""
    looked_at = 0
    for model_type in CONFIG_MAPPING:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                document = CONFIG_MAPPING[model_type]().to_dict()
        except Exception:
            continue
        looked_at += 1
        total = sum(count for _, count in layer_counts._counts(document))
        assert total < 700, model_type
    assert looked_at > 300


def test_large_published_configurations_are_read() -> None:
    found = list((Path(__file__).parent / "configurations").glob("*.json"))
    assert found
    for path in found:
        assert refuses(json.loads(path.read_text())) is None


@pytest.mark.parametrize(
    "added",
    [
        {"suppress_tokens": list(range(5_000))},
        {"label2id": {"layers": 5_000, "blocks": 9_000}},
        {"id2label": {str(number): "depth" for number in range(5_000)}},
        {"moe_layers": list(range(200))},
        {"bad_words_ids": [[1]] * 5_000},
        {"max_position_embeddings": 10**7, "vocab_size": 10**6, "num_experts": 4_096},
        {"vision_feature_layer": -2},
    ],
)
def test_what_counts_no_layers_may_be_any_number(added: dict[str, Any]) -> None:
    assert refuses({"num_hidden_layers": 126, **added}) is None


def test_parts_are_added_up() -> None:
    parts = {f"{name}_config": {"num_hidden_layers": 400} for name in ("text", "vision", "audio")}
    assert refuses(parts) == "asks for too many layers: its counts add up to 1,200, and at most 1,000 are built"


def written(folder: Path, **changed: Any) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(
        json.dumps({**configuration("LlamaForCausalLM"), "architectures": ["LlamaForCausalLM"], **changed})
    )


@pytest.mark.parametrize(
    "words",
    [
        ("params", "./model"),
        ("summary", "./model"),
        ("remove", "lm_head", "-m", "./model", "--dry-run"),
        ("load", "./model"),
    ],
)
def test_it_is_refused_before_torch_is_imported(folder: Path, words: tuple[str, ...]) -> None:
    """The time is that of the processor, so that a busy machine fails nothing."""
    written(folder, num_hidden_layers=20_000)
    before = os.times()
    found = subprocess.run([sys.executable, "-m", "modelcli", *words], capture_output=True, text=True, check=False)
    after = os.times()
    assert found.returncode == 3
    assert "num_hidden_layers is 20,000, and at most 1,000 are built" in found.stderr
    assert "set MODELCLI_MAX_MODULES to more than 20,000" in found.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_arguments_count_too(cli: Cli, folder: Path) -> None:
    written(folder)
    assert "at most 1,000" in cli("params", "hf:./model(num_hidden_layers=20000)", code=3).err
    assert "at most 1,000" in cli("params", "hf:LlamaForCausalLM(num_hidden_layers=20000)", code=3).err
    start = time.process_time()
    cli("params", "hf:BertModel(num_hidden_layers=20000)", code=3)
    assert time.process_time() - start < 1


def test_the_keys_alone_need_no_layers(cli: Cli, folder: Path) -> None:
    written(folder, num_hidden_layers=20_000)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODELS["LlamaForCausalLM"])).save_pretrained(
        folder / "other"
    )
    (folder / "other" / "model.safetensors").rename(folder / "model" / "model.safetensors")
    assert cli("params", "./model", "--bare-keys", "--json").json["totals"]["params"] > 0


def test_the_variable_allows_more(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(folder, num_hidden_layers=1_001)
    assert "at most 1,000 are built" in cli("params", "./model", code=3).err
    monkeypatch.setenv("MODELCLI_MAX_MODULES", "500")
    assert "num_hidden_layers is 1,001, and at most 25 are built" in cli("params", "./model", code=3).err
    monkeypatch.setenv("MODELCLI_MAX_MODULES", "20040")
    assert "layers" not in cli("check", "./model", "--max-params", "1G").err
