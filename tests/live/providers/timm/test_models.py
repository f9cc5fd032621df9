"""`timm:NAME` is what `timm.create_model` builds, with timm's configuration and values from timm's own cache."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import modelcli
from modelcli.commands import blueprint_cache
from modelcli.language.references import Source
from modelcli.live.opening import open_live
from tests.conftest import Cli

#: Models whose arguments and inputs differ: fixed image sizes, several classifiers, features, a stem that is a tuple.
REFERENCES = [
    "resnet18(num_classes=3)",
    "resnet18.a1_in1k(in_chans=1)",
    "vit_tiny_patch16_224(img_size=96, drop_path_rate=0.1)",
    "resnet18(features_only=True, out_indices=[1, 3])",
    "vit_tiny_patch16_224(features_only=True)",
    "deit_tiny_distilled_patch16_224(num_classes=5)",
    "test_vit",
]


def plain(reference: str, **more: object) -> nn.Module:
    """Build the model with plain Python from the same text."""
    name, _, rest = reference.partition("(")
    arguments = eval(f"dict({rest}" if rest else "dict()")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **arguments, **more)
    return model.eval()


@pytest.mark.parametrize("reference", REFERENCES)
def test_names_values_and_outputs_are_those_of_plain_timm(cli: Cli, folder: Path, reference: str) -> None:
    expected = plain(reference)
    document = cli("summary", f"timm:{reference}", "--json").json
    assert document["totals"]["params"] == sum(p.numel() for p in expected.parameters())
    size = document["input"][0]
    with torch.no_grad():
        expected(torch.zeros(size))
    cli("save", "out.pth", "-m", f"timm:{reference}")
    found = torch.load("out.pth", weights_only=True)
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("reference", "size"),
    [
        ("resnet18", [1, 3, 224, 224]),
        ("resnet18(in_chans=1)", [1, 1, 224, 224]),
        ("vit_tiny_patch16_224(img_size=96)", [1, 3, 96, 96]),
        ("vit_tiny_patch16_224(img_size=[64, 96])", [1, 3, 64, 96]),
        ("inception_v3.tv_in1k", [1, 3, 299, 299]),
        ("vit_tiny_patch16_384", [1, 3, 384, 384]),
    ],
)
def test_the_input_is_that_of_timms_configuration(reference: str, size: list[int]) -> None:
    known = open_live(Source(f"timm:{reference}")).inputs
    assert known is not None
    assert [list(shape) for shape in known.shapes] == [size]


def test_the_second_look_needs_no_torch(cli: Cli) -> None:
    cli("params", "timm:test_vit")
    assert blueprint_cache.entries()
    assert cli("params", "timm:test_vit", "--json").json["tensors"]


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("timm:vit_tiny_patch16_225", "did you mean vit_tiny_patch16_224"),
        ("timm:resnet18.a1_in1", "did you mean a1_in1k"),
        ("timm:vit_tiny_patch16_224(img_siz=96)", "did you mean img_size"),
        ("timm:resnet18(3)", "keyword arguments only"),
        ("timm:resnet18(pretrained=True)", "--weights"),
        ("timm:resnet18(checkpoint_path='a.pth')", "--weights FILE"),
        ("timm:resnet18(num_classes='many')", "resnet18"),
        ("timm:./nowhere", "no such folder"),
    ],
)
def test_the_error_for_an_unknown_timm_name_lists_the_closest(cli: Cli, reference: str, told: str) -> None:
    result = cli("params", reference, code=2)
    assert told in result.err


def test_weights_that_a_model_does_not_have_are_refused(cli: Cli) -> None:
    assert "did you mean a1_in1k" in cli("params", "timm:resnet18", "--weights", "a1_in1", code=2).err
    assert "no pretrained weights" in cli("params", "timm:convnext_atto_rms", "--weights", "DEFAULT", code=2).err


def test_a_deprecated_name_means_the_current_one(cli: Cli) -> None:
    document = cli("params", "timm:gluon_resnet18_v1b", "--json").json
    assert document["notes"] == ["timm calls gluon_resnet18_v1b resnet18.gluon_in1k now"]
    assert len(document["tensors"]) == len(plain("resnet18").state_dict())


def put_in_cache(home: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    """Put weights into huggingface_hub's cache."""
    repository = home / "hub" / f"models--timm--{name}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    safetensors.torch.save_file(state, snapshot / "model.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Weights of test_vit in timm's cache, and no network."""
    import huggingface_hub.constants

    state = timm.create_model("test_vit").state_dict()
    put_in_cache(tmp_path / "hf", "test_vit.r160_in1k", state)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return state


def test_pretrained_values_come_from_timms_own_cache(cli: Cli, cached: dict[str, torch.Tensor]) -> None:
    for weights in ("DEFAULT", "r160_in1k"):
        cli("save", "out.pth", "-m", "timm:test_vit", "--weights", weights, "--force")
        found = torch.load("out.pth", weights_only=True)
        assert all(torch.equal(found[name], value) for name, value in cached.items())


def test_pretrained_values_are_adapted_as_timm_adapts_them(cli: Cli, cached: dict[str, torch.Tensor]) -> None:
    reference = "test_vit(num_classes=3, in_chans=1, img_size=96)"
    expected = plain(reference, pretrained=True).state_dict()
    cli("save", "out.pth", "-m", f"timm:{reference}", "--weights", "DEFAULT")
    found = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_looking_at_a_model_with_weights_loads_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_args, **_kwargs: pytest.fail("loaded"))
    assert cli("summary", "timm:test_vit", "--weights", "DEFAULT", "--json").json["totals"]["params"] > 0


def test_weights_that_cannot_be_downloaded_give_exit_code_5(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = cli("save", "out.pth", "-m", "timm:test_vit", "--weights", "DEFAULT", code=5)
    assert "cannot download the weights of timm:test_vit.r160_in1k" in result.err
    assert not Path("out.pth").exists()


@pytest.mark.parametrize(
    ("reference", "head", "stem"),
    [
        ("timm:resnet18", ["fc"], ["conv1"]),
        ("timm:deit_tiny_distilled_patch16_224", ["head", "head_dist"], ["patch_embed.proj"]),
        ("timm:densenet121(num_classes=3)", ["classifier"], ["features.conv0"]),
    ],
)
def test_head_and_stem_are_those_of_timms_configuration(
    cli: Cli, reference: str, head: list[str], stem: list[str]
) -> None:
    for selector, paths in (("@head", head), ("@stem", stem)):
        assert [row["path"] for row in cli("modules", reference, "-s", selector, "--json").json["modules"]] == paths


def test_a_new_head_fits_plain_timm_with_as_many_classes(cli: Cli) -> None:
    cli("replace", "@head", "Linear(_,10)", "-m", "timm:test_vit", "-o", "out.pth")
    model = plain("test_vit(num_classes=10)")
    body = {name: value.clone() for name, value in plain("test_vit").state_dict().items() if "head" not in name}
    model.load_state_dict(torch.load("out.pth", weights_only=True))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in body.items())


def test_a_record_is_followed_and_python_gets_the_model(cli: Cli) -> None:
    import modelcli

    cli("freeze", "patch_embed", "-m", "timm:test_vit(num_classes=4)", "-o", "out.pth")
    assert cli("summary", "out.pth", "--json").json["model"]["class"] == "VisionTransformer"
    model = modelcli.load("out.pth")
    assert type(model) is type(plain("test_vit"))
    assert not model.patch_embed.proj.weight.requires_grad
    loaded = modelcli.load("timm:test_vit(num_classes=4)")
    assert torch.equal(loaded.head.weight, plain("test_vit(num_classes=4)").head.weight)


def test_a_class_of_timm_can_be_placed(cli: Cli) -> None:
    cli("replace", "norm", "timm.layers:LayerNorm(64, eps=1e-5)", "-m", "timm:test_vit", "-o", "out.pth")
    import modelcli

    assert type(modelcli.load("out.pth").norm).__module__.startswith("timm.layers")


def test_the_script_is_plain_timm(cli: Cli, folder: Path) -> None:
    result = cli("script", "-o", "made.pth", "-m", "timm:test_vit(num_classes=4)")
    Path("script.py").write_text(result.out)
    exec(compile(result.out, "script.py", "exec"), {})
    cli("save", "ours.pth", "-m", "timm:test_vit(num_classes=4)")
    made, ours = torch.load("made.pth", weights_only=True), torch.load("ours.pth", weights_only=True)
    assert all(torch.equal(made[name], ours[name]) for name in ours)
    assert "modelcli" not in result.out


def test_the_script_names_pretrained_weights(cli: Cli) -> None:
    result = cli("script", "-o", "made.pth", "-m", "timm:test_vit", "--weights", "DEFAULT")
    assert "timm.create_model('test_vit.r160_in1k', pretrained=True)".replace("'", '"') in result.out


def test_timm_keeps_its_level_of_logging_and_prints_nothing(cli: Cli) -> None:
    before = logging.getLogger("timm").level
    assert cli("params", "timm:test_vit").err == ""
    assert logging.getLogger("timm").level == before
    assert os.environ.get("HF_HUB_OFFLINE") is None


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_model_with_a_new_head_says_how_many_classes_it_has(cli: Cli, folder: Path, name: str) -> None:
    cli("replace", "@head", "Linear(_,10)", "-m", f"timm:{name}", "-o", "out.pth")
    loaded: Any = modelcli.load("out.pth")
    found: dict[str, Any] = {}
    exec(cli("script", "-e", "replace @head Linear(_,10)", "-m", f"timm:{name}", "-o", "made.pth").out, found)
    for model in (loaded, found["model"]):
        assert model.num_classes == 10
        assert {getattr(part, "num_classes", 10) for part in model.modules()} == {10}
    states = [each.state_dict() for each in (loaded, found["model"])]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
