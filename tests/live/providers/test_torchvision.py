"""Every torchvision builder compared with torchvision itself and with the figures that it publishes.

The sweeps that build every model with values are marked; `make test-long` runs them.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelcli.language.references import Source
from modelcli.live.opening import open_live
from modelcli.live.planning import traced
from modelcli.live.providers import torchvision as builders
from modelcli.model.printed import repr_text
from tests.conftest import Cli
from tests.sampling import sampled

NAMES = builders.builder_names()
MODELS = builders.torchvision().models
GROUPS = {name: builders.describe(name).group for name in NAMES}
SMALL = ("alexnet", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18", "densenet121")


def weights_of(name: str) -> list[str]:
    """Return the names of the weights that fit a builder with its default arguments."""
    return [entry.name for entry in MODELS.get_model_weights(name.removeprefix("quantized_"))]


def plain(name: str, **kwargs: Any) -> nn.Module:
    """Call the builder as a user would, without weights."""
    if "weights_backbone" in builders.arguments(name, (), {}, None):
        kwargs.setdefault("weights_backbone", None)
    model: nn.Module = builders.constructor(name)(**{"weights": None, **kwargs})
    return model


def test_there_are_121_builders() -> None:
    assert len(NAMES) == 121 == len(MODELS.list_models())


@pytest.mark.parametrize("name", sampled(NAMES, one_in=8))
def test_printed_form_parameters_and_macs_equal_torchvisions(name: str) -> None:
    """The printed form equals `print(model)`; parameters and MACs equal the published figures."""
    live = open_live(Source(name))
    blueprint = traced(live)
    assert repr_text(blueprint) == repr(live.module)
    assert all(tensor.is_meta for tensor in (*live.module.parameters(), *live.module.buffers()))
    entry = next(iter(MODELS.get_model_weights(name.removeprefix("quantized_"))))
    trace = blueprint.trace
    assert trace is not None
    if GROUPS[name] in ("detection", "segmentation"):  # with weights, these have auxiliary heads or other norms
        trained = traced(open_live(Source(name, weights=entry.name)))
        assert trained.totals.params == entry.meta["num_params"]
    elif name not in ("googlenet", "quantized_googlenet"):  # the published number leaves out the auxiliary heads
        published = {e.meta["num_params"] for e in MODELS.get_model_weights(name.removeprefix("quantized_"))}
        assert blueprint.totals.params in published | ({632045800} if name == "vit_h_14" else set())
    if GROUPS[name] == "detection":
        assert trace.reason is not None
        assert "needs values" in trace.reason
        assert len(trace.layers) > 50  # the modules that ran have rows
    else:
        assert trace.reason is None
    if GROUPS[name] in ("classification", "video", "quantization"):
        published_macs = {e.meta["_ops"] for e in MODELS.get_model_weights(name.removeprefix("quantized_"))}
        assert any(near(trace.macs, macs) for macs in published_macs)


def near(macs: int | None, published: float) -> bool:
    """Within 1%, or within the rounding of the published figure, which has three decimals."""
    assert macs is not None
    return abs(macs / 1e9 - published) <= max(0.01 * published, 0.0005)


def test_the_published_figure_that_leaves_out_auxiliary_heads() -> None:
    """googlenet has 13,004,888 parameters as built. The published 6,624,904 are those of its weights' architecture."""
    assert traced(open_live(Source("googlenet"))).totals.params == 13_004_888
    assert traced(open_live(Source("googlenet", weights="DEFAULT"))).totals.params == 6_624_904


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_macs_with_each_weights_name(name: str) -> None:
    """Each weights name brings its own input size and architecture; the MACs are those published for it."""
    if GROUPS[name] not in ("classification", "video"):
        pytest.skip("torchvision publishes no MACs of one forward pass for it that the meta device can make")
    for entry in MODELS.get_model_weights(name):
        trace = traced(open_live(Source(name, weights=entry.name))).trace
        assert trace is not None
        assert near(trace.macs, entry.meta["_ops"]), entry


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_totals_of_a_real_build(name: str) -> None:
    """`sum(p.numel())`, names, shapes, flags and buffers equal those of the plain constructor."""
    model = plain(name)
    blueprint = open_live(Source(name)).describe()
    assert blueprint.totals.params == sum(p.numel() for p in model.parameters())
    assert blueprint.totals.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert blueprint.totals.buffers == sum(b.numel() for b in model.buffers())
    found = {t.name: (t.shape, t.dtype) for t in blueprint.tensors if t.persistent}
    assert found == {n: (tuple(t.shape), str(t.dtype)[6:]) for n, t in model.state_dict().items()}
    assert repr_text(blueprint) == repr(model)
    del model
    gc.collect()


def structure(model: nn.Module) -> list[tuple[str, str, tuple[int, ...], bool]]:
    rows = [(name, type(module).__name__, (), False) for name, module in model.named_modules()]
    parameters = {name: p.requires_grad for name, p in model.named_parameters()}
    return rows + [  # type: ignore[return-value]
        (name, "tensor", tuple(t.shape), parameters.get(name, False)) for name, t in model.state_dict().items()
    ]


CHANGED = [
    name
    for name in NAMES
    if GROUPS[name] in ("detection", "segmentation") or "googlenet" in name or "inception" in name or "vit_h" in name
]


@pytest.mark.parametrize("name", sampled(CHANGED, one_in=6))
def test_a_weights_name_changes_the_architecture(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The architecture of a weights name is the one that torchvision builds when it loads these weights.

    The file of weights is made up, and is in torchvision's cache.
    """
    weights = weights_of(name)[0]
    live = open_live(Source(name, weights=weights))
    assert not list(folder.rglob("*.pth"))  # showing it downloaded nothing
    state = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in fresh_state(name, weights).items()}
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_args, **_kwargs: dict(state), raising=True
    )
    model = plain(name, weights=weights)
    assert structure(live.module) == structure(model)


def fresh_state(name: str, weights: str) -> dict[str, torch.Tensor]:
    """Return the state dict in the file of a weights name, with auxiliary heads.

    torchvision builds googlenet and inception with their auxiliary heads, loads the file, and removes the heads.
    """
    if "googlenet" in name or "inception" in name:
        kwargs = {"transform_input": True} | ({"aux_logits": True})
        with torch.device("meta"):
            return plain(name, init_weights=False, **kwargs).state_dict()
    return open_live(Source(name, weights=weights)).module.state_dict()


def last_classifying_layer(model: nn.Module, classes: int = 1000) -> tuple[str, nn.Module]:
    """Return the last Linear or Conv2d whose output channels are the classes, without auxiliary heads."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if (getattr(module, "out_features", None) == classes or getattr(module, "out_channels", None) == classes)
        and not name.lower().startswith("aux")
    ]
    return found[-1]


def replace_the_head(cli: Cli, name: str) -> None:
    live = open_live(Source(name))
    path, old = last_classifying_layer(live.module)
    is_linear = isinstance(old, nn.Linear)
    text = "Linear(_,10)" if is_linear else "Conv2d(_,10,1)"
    cli("replace", path, text, "-m", name, "-o", "head10.pth", "--force")
    kwargs = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = plain(name, **kwargs)
    new = nn.Linear(old.in_features, 10) if is_linear else nn.Conv2d(old.in_channels, 10, 1)  # type: ignore[arg-type]
    model.set_submodule(path, new)
    model.load_state_dict(torch.load("head10.pth", weights_only=True, mmap=True), assign=True)
    assert live.inputs is not None
    with torch.inference_mode():
        output = model.eval()(torch.randn(live.inputs.shapes[0]))
    assert tuple(output.shape) == (1, 10)
    Path("head10.pth").unlink()


@pytest.mark.parametrize("name", SMALL)
def test_replace_the_last_classifying_layer(cli: Cli, name: str) -> None:
    replace_the_head(cli, name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in NAMES if GROUPS[name] == "classification" and name not in SMALL])
def test_replace_the_last_classifying_layer_of_every_builder(cli: Cli, name: str) -> None:
    replace_the_head(cli, name)
    gc.collect()


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "AlexNet_Weights.IMAGENET1K_V1"])
def test_weights_come_from_torchvisions_cache(cli: Cli, folder: Path, weights: str) -> None:
    """`--weights` takes the file from torchvision's cache; the test puts a made-up one there."""
    torch.manual_seed(5)
    state = plain("alexnet").state_dict()
    cache = folder / ".torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    url = MODELS.get_model_weights("alexnet").IMAGENET1K_V1.url
    torch.save(state, cache / url.rpartition("/")[2])
    cli("replace", "classifier.6", "Linear(_,10)", "-m", "alexnet", "--weights", weights, "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    for name, tensor in state.items():
        if not name.startswith("classifier.6"):
            assert torch.equal(written[name], tensor), name
    cli("load", "alexnet", "--weights", weights)
    assert f'weights = "{weights}"' in (folder / "modelcli.toml").read_text()


def test_weights_that_cannot_be_downloaded(cli: Cli, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Without a network, the exit code is 5, the error gives the reason, and no recipe is written."""
    import urllib.error
    import urllib.request

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise urllib.error.URLError("network is unreachable")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    result = cli("load", "alexnet", "--weights", "DEFAULT", code=5)
    assert "network is unreachable" in result.err
    assert "--weights FILE" in result.err
    assert not (folder / "modelcli.toml").exists()


def test_a_wrong_weights_name(cli: Cli) -> None:
    result = cli("summary", "alexnet", "--weights", "IMAGENET1K_V2", code=2)
    assert "alexnet has no weights 'IMAGENET1K_V2'" in result.err
    assert "IMAGENET1K_V1" in result.err


def test_weights_from_a_file(cli: Cli) -> None:
    torch.manual_seed(3)
    state = plain("squeezenet1_1").state_dict()
    torch.save(state, "mine.pth")
    cli("save", "out.safetensors", "-m", "squeezenet1_1", "--weights", "mine.pth")
    from safetensors.torch import load_file

    written = load_file("out.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_arguments_of_builders(cli: Cli) -> None:
    rows = cli("modules", "resnet18(num_classes=7)", "-s", "fc", "--json").json["modules"]
    assert rows[0]["config"] == "in_features=512, out_features=7, bias=True"
    rows = cli("modules", "resnet18(norm_layer=Identity)", "-s", "bn1", "--json").json["modules"]
    assert rows[0]["type"] == "Identity"
    result = cli("summary", "alexnet(clases=10)", code=2)
    assert "clases" in result.err
    assert "num_classes: int = 1000" in result.err  # the signature
    assert "keyword arguments" in cli("summary", "alexnet(10)", code=2).err


def test_list(cli: Cli) -> None:
    models = cli("list", "--json").json["models"]
    assert [model["name"] for model in models] == NAMES
    alexnet = next(model for model in models if model["name"] == "alexnet")
    assert alexnet == {
        "name": "alexnet",
        "params": 61_100_840,
        "macs": 714_000_000,
        "input_size": None,
        "weights": ["IMAGENET1K_V1"],
        "group": "classification",
    }
    assert {model["group"] for model in models} == {
        "classification",
        "detection",
        "segmentation",
        "video",
        "optical_flow",
        "quantization",
    }
    assert [m["name"] for m in cli("list", "vgg1?", "--json").json["models"]] == ["vgg11", "vgg13", "vgg16", "vgg19"]
    assert "nearest: alexnet" in cli("list", "alexnt", code=2).err


def test_the_error_for_a_wrong_builder_argument_names_the_closest(cli: Cli) -> None:
    error = cli("summary", "resnet18(num_clases=10)", code=2).err
    assert "unexpected keyword argument 'num_clases'" in error
    assert "hint: did you mean num_classes" in error
