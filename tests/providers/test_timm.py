"""What modelcli knows about timm's models without importing timm agrees with timm itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import _registry

from modelcli.providers.known_code import runs_known_code
from modelcli.providers.timm import PROVIDER, is_model_name
from modelcli.resolve import parse


def test_names_are_those_that_timm_lists() -> None:
    assert sorted(PROVIDER.names()) == sorted(timm.list_models())


def test_names_with_tags_are_right_and_nearly_complete() -> None:
    tagged = {name for name in timm.list_models(include_tags=True) if "." in name}
    found = {name for name in PROVIDER.full_names() if "." in name}
    assert len(found & tagged) > 0.97 * len(tagged)  # a few are made by code
    assert len(found - tagged) <= 5
    assert {"a1_in1k", "augreg_in21k_ft_in1k"} <= set(PROVIDER.weights_names())


@pytest.mark.parametrize(
    "name", ["resnet50", "vit_base_patch16_224", "convnext_tiny", "efficientnet_b0", "beit_base_patch16_224"]
)
def test_weights_of_one_model_are_its_tags(name: str) -> None:
    expected = {"DEFAULT", *_registry._model_with_tags[name]}
    assert {"DEFAULT", *(f"{name}.{tag}" for tag in PROVIDER.weights_names_of(name)[1:])} == expected
    assert PROVIDER.weights_names_of(f"{name}.x") == PROVIDER.weights_names_of(name)
    assert not PROVIDER.weights_names_of("no_such_model")


def test_neither_torch_nor_timm_is_imported_for_it() -> None:
    code = (
        "import sys; from modelcli.providers.timm import PROVIDER, is_model_name;"
        "PROVIDER.full_names(), PROVIDER.names_like(['conv1.weight']), is_model_name('resnet50');"
        "sys.exit(bool({'torch', 'timm', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("resnet50", True),
        ("resnet50.a1_in1k", True),
        ("resnet51", False),
        ("_create_resnet", False),
        ("checkpoint_filter_fn", False),
        ("./resnet50", False),
        ("hf-hub:timm/resnet50", False),
        ("local-dir:resnet50", False),
    ],
)
def test_a_record_may_name_registered_models_alone(name: str, known: bool) -> None:
    assert is_model_name(name) is known
    assert PROVIDER.is_known_code(name) is known


def test_a_record_may_name_classes_of_timm_but_no_other_code_in_arguments() -> None:
    for text, known in (
        ("timm:resnet18(num_classes=3)", True),
        ("timm:resnet18(norm_layer=timm.layers.LayerNorm2d)", True),
        ("timm:resnet18(norm_layer=timm.data.loader.PrefetchLoader)", False),
        ("timm:resnet18(norm_layer=os.path)", False),
    ):
        reference = parse(text)
        assert runs_known_code(reference) is known, text


def test_timm_owns_its_layers_and_models() -> None:
    assert all(map(PROVIDER.owns, ("timm.layers", "timm.layers.norm", "timm.models.resnet")))
    assert not any(map(PROVIDER.owns, ("timm", "timm.data", "timm.models_of_mine", "timm.utils")))


def test_a_folder_is_a_model_by_its_configuration(tmp_path: Path) -> None:
    assert not PROVIDER.recognises(tmp_path)
    for document, known in (
        ({"architecture": "resnet18", "pretrained_cfg": {}}, True),
        ({"architecture": "resnet18", "model_type": "timm_wrapper"}, False),
        ({"architectures": ["BertModel"], "model_type": "bert"}, False),
        ({"architecture": 3}, False),
        ([], False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(document))
        assert PROVIDER.recognises(tmp_path) is known, document
    (tmp_path / "config.json").write_text("{")
    assert not PROVIDER.recognises(tmp_path)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "densenet121", "swin_tiny_patch4_window7_224"])
def test_candidates_are_models_of_files_with_the_names_of_the_checkpoint(name: str) -> None:
    with torch.device("meta"):
        keys = list(timm.create_model(name).state_dict())
    groups = PROVIDER.names_like(keys)
    assert any(name in group for group in groups)
    assert sum(map(len, groups)) < len(_registry._model_entrypoints) / 2


def test_keys_of_no_model_have_no_candidates() -> None:
    assert PROVIDER.names_like([f"quokka.{n}.wombat.koala.weight" for n in range(30)]) == []


@pytest.mark.parametrize("keys", [["w"], ["conv1.weight", "fc.bias"], [f"layers.{n}.weight" for n in range(30)]])
def test_too_few_keys_have_no_candidates(keys: list[str]) -> None:
    assert PROVIDER.names_like(keys) == []
