"""A checkpoint is adapted as by `pretrained=True`, bit for bit. Plain timm with the same file is the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from modelcli.language.references import Source
from modelcli.live.opening import open_live
from modelcli.live.sources import Value, source_of
from tests.conftest import Cli

pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # timm's own


def saved(name: str, path: str = "best.pth", **arguments: Any) -> dict[str, torch.Tensor]:
    """Save a model's state dict with random, different values."""
    torch.manual_seed(1)
    state = timm.create_model(name, **arguments).state_dict()
    state = {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in state.items()}
    torch.save(state, path)
    return state


def loaded_by_timm(name: str, path: str = "best.pth", **arguments: Any) -> dict[str, torch.Tensor]:
    """Return what plain timm makes of the file."""
    torch.manual_seed(0)
    overlay = {"file": path}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    return dict(model.state_dict())


def as_text(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


#: The file's model, its arguments, those of the model that it is loaded into, and the text of the notes.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("test_vit", {}, {"img_size": 96}, "timm resizes pos_embed from [1, 101, 64] to [1, 37, 64]"),
    ("test_vit", {}, {"num_classes": 3}, "timm does not load head.bias, head.weight: the model has 3 classes"),
    ("test_vit", {}, {"in_chans": 1}, "timm adapts patch_embed.proj.weight from 3 to 1 input channels"),
    ("test_vit", {}, {"in_chans": 5, "num_classes": 2, "img_size": 192}, "timm adapts patch_embed.proj.weight"),
    ("resnet18", {}, {"in_chans": 2}, "timm adapts conv1.weight from 3 to 2 input channels"),
    ("swin_tiny_patch4_window7_224", {}, {"img_size": 256, "window_size": 8}, "timm resizes layers.0"),
    ("vit_tiny_patch16_224", {}, {"patch_size": 8}, "timm resizes"),
    ("test_vit", {}, {"features_only": True}, ""),
    ("resnet18", {}, {"features_only": True, "in_chans": 1}, "timm adapts conv1.weight"),
    ("resnet18", {}, {"features_only": True, "out_indices": [1, 2]}, ""),
    ("naflexvit_base_patch16_gap", {"embed_dim": 96, "depth": 1, "num_heads": 3}, {"in_chans": 1}, ""),
    ("beit_base_patch16_224", {"embed_dim": 96, "depth": 1, "num_heads": 3}, {"img_size": 96}, "timm resizes"),
    ("eva02_tiny_patch14_224", {"depth": 1}, {"img_size": 112}, "timm resizes pos_embed"),
]


@pytest.mark.parametrize(("name", "made_with", "loaded_with", "told"), CASES, ids=lambda value: str(value)[:40])
def test_values_are_those_of_plain_timm(
    cli: Cli, folder: Path, name: str, made_with: dict[str, Any], loaded_with: dict[str, Any], told: str
) -> None:
    saved(name, **made_with)
    arguments = {**made_with, **loaded_with}
    expected = loaded_by_timm(name, **arguments)
    result = cli("save", "out.pth", "-m", "best.pth", "--arch", f"timm:{name}({as_text(arguments)})")
    found = torch.load("out.pth", weights_only=True)
    assert found.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(found[key], expected[key])]
    drawn = [key for key in different if key.startswith("head")]  # random in both, but drawn at different times
    assert different == drawn
    assert told in result.err


def test_the_real_model_has_the_same_values(folder: Path) -> None:
    import modelcli

    saved("test_vit")
    arguments = {"img_size": 96, "in_chans": 1}
    expected = loaded_by_timm("test_vit", **arguments)
    model = modelcli.load("best.pth", arch=f"timm:test_vit({as_text(arguments)})")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())


def test_adapted_tensors_keep_their_source_and_no_bytes_are_read(folder: Path) -> None:
    saved("test_vit")
    live = open_live(Source("best.pth", arch="timm:test_vit(img_size=96)"))
    sources = {name: source_of(parameter) for name, parameter in live.module.named_parameters()}
    assert not any(isinstance(source, Value) for source in sources.values())
    assert type(sources["head.weight"]).__name__ == "Span"
    assert type(sources["pos_embed"]).__name__ == "Computed"


def test_a_checkpoint_that_fits_keeps_its_own_classifier(cli: Cli) -> None:
    state = saved("test_vit", num_classes=7)
    result = cli("save", "out.pth", "-m", "best.pth", "--arch", "timm:test_vit(num_classes=7)")
    found = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert "timm" not in result.err.replace("timm:test_vit", "")


def test_the_number_of_classes_is_that_of_the_file(cli: Cli) -> None:
    state = saved("test_vit", num_classes=7)
    cli("save", "out.pth", "-m", "best.pth", "--arch", "timm:test_vit(num_classes=7, img_size=96)")
    assert torch.equal(torch.load("out.pth", weights_only=True)["head.weight"], state["head.weight"])
    result = cli("save", "out.pth", "-m", "best.pth", "--arch", "timm:test_vit", "--force")
    assert "timm does not load head.bias, head.weight" in result.err


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net."])
def test_wrapper_prefixes_are_removed_before_timm_adapts(cli: Cli, prefix: str) -> None:
    state = saved("test_vit")
    expected = loaded_by_timm("test_vit", img_size=96)
    torch.save({"state_dict": {f"{prefix}{key}": value for key, value in state.items()}}, "wrapped.pth")
    result = cli("save", "out.pth", "-m", "wrapped.pth", "--arch", "timm:test_vit(img_size=96)")
    found = torch.load("out.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert prefix in result.err


def test_old_keys_get_their_current_names(cli: Cli) -> None:
    """timm renames the keys of Facebook's ConvNeXt."""
    state = timm.create_model("convnext_atto", num_classes=4).state_dict()
    old = {}
    for key, value in state.items():
        key = key.replace("stem.0", "downsample_layers.0.0").replace("stem.1", "downsample_layers.0.1")
        for stage in range(1, 4):
            key = key.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}")
        key = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1")
        key = key.replace("mlp.fc2", "pwconv2").replace("head.norm", "norm").replace("head.fc", "head")
        old[key] = value
    torch.save(old, "best.pth")
    expected = loaded_by_timm("convnext_atto", num_classes=4)
    result = cli("save", "out.pth", "-m", "best.pth", "--arch", "timm:convnext_atto(num_classes=4)")
    found = torch.load("out.pth", weights_only=True)
    body = [key for key in expected if not key.startswith("head.fc")]  # plain timm drops four classes
    assert all(torch.equal(found[key], expected[key]) for key in body)
    assert torch.equal(found["head.fc.weight"], state["head.fc.weight"])
    assert "under another name, such as downsample_layers.0.0.weight as stem.0.weight" in result.err


def test_channels_that_timm_cannot_adapt_give_exit_code_1(cli: Cli) -> None:
    saved("test_vit", in_chans=4)
    result = cli("load", "best.pth", "--arch", "timm:test_vit(in_chans=1)", code=1)
    assert "inconsistent with input_size" in result.err


def test_missing_tensors_are_still_missing(cli: Cli) -> None:
    state = saved("test_vit")
    del state["norm.weight"]
    torch.save(state, "best.pth")
    result = cli("load", "best.pth", "--arch", "timm:test_vit(img_size=96, num_classes=3)", code=1)
    assert "missing: norm.weight" in result.err


def test_weights_of_a_file_are_adapted_too(cli: Cli) -> None:
    saved("test_vit")
    expected = loaded_by_timm("test_vit", img_size=96)
    cli("save", "out.pth", "-m", "timm:test_vit(img_size=96)", "--weights", "best.pth")
    found = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_result_opens_again_without_any_adaptation(cli: Cli) -> None:
    saved("test_vit")
    cli("save", "out.pth", "-m", "best.pth", "--arch", "timm:test_vit(img_size=96, num_classes=3)")
    assert cli("save", "again.pth", "-m", "out.pth").err.count("timm ") == 0
    one, other = torch.load("out.pth", weights_only=True), torch.load("again.pth", weights_only=True)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("made_with", "loaded_with"),
    [
        ({}, "img_size=96"),
        ({}, "num_classes=3"),
        ({"num_classes": 7}, ""),
        ({"num_classes": 7}, "num_classes=7, in_chans=1"),
    ],
)
def test_the_script_lets_timm_adapt_the_file(cli: Cli, made_with: dict[str, Any], loaded_with: str) -> None:
    saved("test_vit", **made_with)
    words = ("-m", "best.pth", "--arch", f"timm:test_vit({loaded_with})")
    cli("save", "ours.pth", *words)
    script = cli("script", "-o", "made.pth", *words).out
    assert "pretrained_cfg_overlay" in script
    exec(compile(script, "script.py", "exec"), {})
    made, ours = torch.load("made.pth", weights_only=True), torch.load("ours.pth", weights_only=True)
    assert made.keys() == ours.keys()
    assert all(torch.equal(made[key], ours[key]) for key in ours)
