"""`adapt` on models of timm equals what timm makes of the same weights with other arguments."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import modelcli
from tests.conftest import Cli

timm = pytest.importorskip("timm")


def saved(name: str) -> Any:
    """Save a model in `m.pth`, with other values than its constructor draws with seed 0."""
    torch.manual_seed(5)
    model = timm.create_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.5)
    torch.save(model.state_dict(), "m.pth")
    return model


def by_timm(name: str, **arguments: Any) -> dict[str, torch.Tensor]:
    """Return what timm's own loader makes of `m.pth`."""
    overlay = {"file": "m.pth", "hf_hub_id": None, "url": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    state: dict[str, torch.Tensor] = made.state_dict()
    return state


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, but: str | None = None) -> bool:
    keys = [key for key in expected if but is None or not key.startswith(f"{but}.")]
    assert list(found) == list(expected)
    assert [value.shape for value in found.values()] == [value.shape for value in expected.values()]
    return all(torch.equal(found[key], expected[key]) for key in keys)


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_vit3", "test_vit4", "test_resnet", "test_efficientnet", "test_convnext"]
)
@pytest.mark.parametrize("channels", [1, 4])
def test_classes_and_channels_equal_create_model(cli: Cli, name: str, channels: int) -> None:
    model = saved(name)
    words = ("--classes", 5, "--in-channels", channels, "-m", "m.pth", "--arch", f"timm:{name}")
    done = cli("adapt", *words, "-o", "o.pth", "--json").json
    assert done["check"]["output_shape"] == [1, 5]
    found = torch.load("o.pth", weights_only=True)
    expected = by_timm(name, num_classes=5, in_chans=channels)
    assert same(found, expected, but=model.pretrained_cfg["classifier"])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", 192),
        pytest.param("test_vit", 96, marks=pytest.mark.sweep),
        ("test_vit3", 224),
        pytest.param("swin_tiny_patch4_window7_224", 448, marks=pytest.mark.sweep),
        pytest.param("swinv2_tiny_window8_256", 512, marks=pytest.mark.sweep),
        pytest.param("eva02_tiny_patch14_224", 336, marks=pytest.mark.sweep),
        pytest.param("beit_base_patch16_224", 384, marks=pytest.mark.sweep),
        pytest.param("maxvit_tiny_tf_224", 192, marks=pytest.mark.sweep),
        ("test_coatnet", 192),
    ],
)
def test_the_image_size_equals_create_model(cli: Cli, name: str, size: int) -> None:
    saved(name)
    words = ("adapt", "--image-size", size, "-m", "m.pth", "--arch", f"timm:{name}")
    done = cli(*words, "-o", "o.pth", "--json").json
    assert done["edits"] == [f"resize . image_size={size}"]
    assert done["check"]["input"] == [[1, 3, size, size]]
    found = torch.load("o.pth", weights_only=True)
    assert same(found, by_timm(name, img_size=size))
    timm.create_model(name, img_size=size).load_state_dict(found, strict=True)
    assert cli("summary", "o.pth", "--json").json["input"] == [[1, 3, size, size]]
    if name == "test_vit":
        real = modelcli.load("o.pth")
        assert real.patch_embed.img_size == (size, size)
        Path("s.py").write_text(cli("script", "-e", done["edits"][0], *words[3:], "-o", "s.pth").out)
        subprocess.run([sys.executable, "s.py"], check=True)
        assert same(torch.load("s.pth", weights_only=True), found)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mixer_s16_224", "blocks.0.mlp_tokens.fc1.weight"),
        ("resmlp_12_224", "blocks.0.linear_tokens.weight"),
        ("gmlp_s16_224", "blocks.0.mlp_channels.gate.proj.weight"),
        ("levit_128s", "stages.0.blocks.0.attn.attention_biases"),
        ("cait_xxs24_224", "pos_embed"),
    ],
)
def test_what_timm_cannot_resize_is_named(cli: Cli, name: str, tensor: str) -> None:
    done = cli("adapt", "--image-size", 320, "-m", f"timm:{name}", "-o", "o.pth", code=2)
    told = f"timm:{name} does not take images of 320x320 as it is, and timm builds {name} for it with another {tensor}"
    assert told in done.err
    assert "it has no function that carries the values of" in done.err
    assert "timm may build it for that size with new values: timm:NAME(img_size=320)" in done.err
    old, new = timm.create_model(name).state_dict(), timm.create_model(name, img_size=320).state_dict()
    assert old[tensor].shape != new[tensor].shape


def test_what_timm_does_not_build_for_a_size_is_told(cli: Cli) -> None:
    with pytest.raises(Exception, match=r"\w") as error:
        timm.create_model("mixer_s16_224", img_size=8)
    done = cli("adapt", "--image-size", 8, "-m", "timm:mixer_s16_224", "-o", "o.pth", code=2)
    assert f"timm does not build mixer_s16_224 for it: {str(error.value).splitlines()[0]}" in done.err


def test_a_model_without_a_classifier_is_an_error(cli: Cli) -> None:
    done = cli("adapt", "--classes", 5, "-m", "timm:test_vit(num_classes=0)", "-o", "o.pth", code=2)
    assert "error: " in done.err
    assert not Path("o.pth").exists()
