"""`replace`: what `_` means, what a new module does not take over, and what --keep-weights keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

import modelcli
from modelcli.errors import RequestError
from modelcli.live.surgery import seed_of
from tests.conftest import Cli

OWN = '''
import torch
from torch import nn

class Act(nn.BatchNorm2d):
    """As timm has them: a norm with the activation inside."""
    def __init__(self, n):
        super().__init__(n)
        self.drop = nn.Identity()
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = Act(8)

    def forward(self, x):
        return self.bn(self.conv(x))

class Conv1D(nn.Module):
    """As transformers has it: a linear layer whose weight is [in, out]."""
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias

class GPT(nn.Sequential):
    def __init__(self):
        super().__init__(Conv1D(5, 4), nn.ReLU(), nn.Linear(5, 2))

def build(width=3):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU())

class Backboned(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Conv2d(3, 16, 1)
    def forward(self, x):
        return self.backbone(x)
'''


@pytest.fixture
def _own(folder: Path) -> None:
    (folder / "own.py").write_text(OWN)


def own(name: str) -> nn.Module:
    namespace: dict[str, type[nn.Module]] = {}
    exec(OWN, namespace)
    return namespace[name]()


# --- `_` -----------------------------------------------------------------------------------------------------------


def test_the_width_of_an_image_does_not_fill_in_features(cli: Cli) -> None:
    error = cli("replace", "classifier.1", "Linear(_,10)", "-m", "squeezenet1_1", "--json", code=2).error
    assert "the last axis of [1,512,13,13], which flows in, is the width of an image" in error["message"]
    assert error["hint"].startswith("Conv2d(_,10,1) works on the channels")
    cli("replace", "classifier.1", "Conv2d(_,10,1)", "-m", "squeezenet1_1")  # the hint works
    # The same for a layer without channels, and after a pooling layer.
    for place in ("maxpool", "avgpool", "relu"):
        assert "the width of an image" in cli("replace", place, "Linear(_,10)", "-m", "resnet18", code=2).err
    for place in ("append features Linear(_,10)", "insert features.3 Linear(_,10)"):
        assert "the width of an image" in cli(*place.split(), "-m", "alexnet", code=2).err


def test_the_last_dimension_fills_in_features(cli: Cli) -> None:
    for place, model, width in (
        ("features.1.0.norm1", "swin_t", 96),  # [N,H,W,C] behind a Permute
        ("encoder.layers.encoder_layer_0.dropout", "vit_b_16", 768),  # tokens
        ("features.1.0.block.4", "convnext_tiny", 384),  # behind a Linear, between two Permutes
    ):
        changes = cli("replace", place, "Linear(_,_)" if "Drop" in place else "Linear(_,7)", "-m", model, "--check",
                      "none", "--json").json["changes"]  # fmt: skip
        assert changes[0]["after"] == f"Linear({width}, 7)"


def test_channels_are_not_filled_in_from_another_dimension(cli: Cli) -> None:
    error = cli("replace", "features.1.0.norm1", "Conv2d(_,8,1)", "-m", "swin_t", "--json", code=2).error
    assert "features on the last axis, not channels on the second" in error["message"]


@pytest.mark.parametrize(
    ("old", "expression", "made"),
    [
        (nn.Embedding(5, 4), "Embedding(_,_,padding_idx=_,max_norm=_)", nn.Embedding(5, 4)),
        (nn.Embedding(5, 4, padding_idx=2, max_norm=1.0), "Embedding(_,_,padding_idx=_,max_norm=_)", None),
        (nn.BatchNorm2d(4, momentum=None), "BatchNorm2d(_,momentum=_)", None),
        (nn.MultiheadAttention(8, 2, bias=False), "MultiheadAttention(_,4,bias=_)", None),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "MultiheadAttention(_,_,add_bias_kv=_)", None),
        (nn.LSTM(3, 4, bias=False), "GRU(_,_,bias=_)", None),
    ],
)
def test_none_is_a_value_and_a_bias_has_many_names(old: nn.Module, expression: str, made: nn.Module | None) -> None:
    model = nn.ModuleDict({"x": old})
    names = [part.partition("=")[0].strip() for part in expression.partition("(")[2].rstrip(")").split(",")[2:]]
    modelcli.apply(model, f"replace x {expression}")
    new = model["x"]
    for name in names:
        if name == "bias":
            assert [key for key in new.state_dict() if "bias" in key] == []
        elif name == "add_bias_kv":
            assert new.bias_k is not None
        else:
            assert getattr(new, name) == getattr(old, name)
    if made is not None:
        assert repr(new) == repr(made)


def test_a_nested_hole_takes_what_the_modules_before_it_give(cli: Cli) -> None:
    head = "Sequential(Linear(_,256),ReLU(),Dropout(0.1),Linear(_,10))"
    words = cli("replace", "fc", head, "-m", "resnet18", "--json").json
    assert words["check"]["output_shape"] == [1, 10]
    model = modelcli.apply(torchvision.models.resnet18(), f"replace fc {head}")
    assert [(m.in_features, m.out_features) for m in model.fc if isinstance(m, nn.Linear)] == [(512, 256), (256, 10)]
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize(
    ("expression", "sizes"),
    [
        ("Sequential(Dropout(0.2),Linear(_,_))", [512]),
        ("Sequential(Linear(_,64),Sequential(ReLU(),Linear(_,32)),LayerNorm(_),Linear(_,_))", [512, 64, 32, 32]),
        ("Sequential(Unflatten(1,(512,1,1)),Conv2d(_,8,1),BatchNorm2d(_),Flatten(),Linear(_,3))", [512, 8, 8]),
    ],
)
def test_flows_through_many_kinds_of_modules(expression: str, sizes: list[int]) -> None:
    model = modelcli.apply(torchvision.models.resnet18(), f"replace fc {expression}")
    found = [
        getattr(m, name) if name != "normalized_shape" else m.normalized_shape[0]
        for m in model.fc.modules()
        for name in ("in_features", "in_channels", "num_features", "normalized_shape")
        if hasattr(m, name)
    ]
    assert found == sizes
    assert model.eval()(torch.zeros(1, 3, 64, 64)).dim() == 2


def test_a_nested_hole_in_a_file_without_architecture(cli: Cli) -> None:
    torch.save(nn.Linear(6, 4).state_dict(), "bare.pth")
    torch.save({f"fc.{name}": value for name, value in nn.Linear(6, 4).state_dict().items()}, "bare.pth")
    cli("replace", "fc", "Sequential(Linear(_,5),ReLU(),Linear(_,3))", "-m", "bare.pth", "-o", "out.pth")
    state = torch.load("out.pth", weights_only=True)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "fc.0.weight": (5, 6), "fc.0.bias": (5,), "fc.2.weight": (3, 5), "fc.2.bias": (3,),
    }  # fmt: skip


def test_an_unknown_output_of_a_nested_module_fills_no_hole(cli: Cli) -> None:
    error = cli("replace", "fc", "Sequential(Conv2d(512,8,1),Linear(_,3))", "-m", "resnet18", "--json", code=2).error
    assert "the output of the modules before it is not" in error["message"]


@pytest.mark.parametrize(
    ("model", "place", "expression", "width"),
    [
        ("fasterrcnn_mobilenet_v3_large_fpn", "roi_heads.box_predictor", "FastRCNNPredictor(_,3)", 1024),
        ("efficientnet_b0", "features.1.0.block.1", "SqueezeExcitation(_,32)", 32),
    ],
)
def test_classes_of_torchvision_by_their_bare_names(
    cli: Cli, model: str, place: str, expression: str, width: int
) -> None:
    cli("apply", "-e", f"replace {place} {expression}", "-m", model, "--check", "none", "-o", "out.pth")
    new = modelcli.load("out.pth").get_submodule(place)
    assert type(new).__name__ == expression.partition("(")[0]
    first = next(child for child in new.modules() if hasattr(child, "in_features") or hasattr(child, "in_channels"))
    assert width == getattr(first, "in_features", None) or width == first.in_channels


@pytest.mark.usefixtures("_own")
@pytest.mark.parametrize(
    "expression",
    ["torchvision.models:resnet18(num_classes=16)", "torchvision.models.resnet:resnet18(num_classes=16)"],
)
def test_a_function_that_returns_a_module_makes_one(cli: Cli, expression: str) -> None:
    words = ("-m", "own.py:Backboned", "--check", "none")
    cli("replace", "backbone", expression, *words, "-o", "out.pth")
    torch.manual_seed(seed_of(0, 1))
    expected = torchvision.models.resnet18(num_classes=16).state_dict()
    state = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in expected.items())
    text = cli("script", "-e", f"replace backbone {expression}", "-m", "own.py:Backboned", "-o", "script.pth").out
    Path("work.py").write_text(text)
    subprocess.run([sys.executable, "work.py"], check=True, capture_output=True)
    again = torch.load("script.pth", weights_only=True)
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.usefixtures("_own")
def test_a_users_function_makes_a_module(cli: Cli) -> None:
    shown = cli("replace", "0", "own.py:build(width=5)", "-m", "Sequential(Linear(4,5))", "--check", "none").out
    assert "Sequential" in shown
    words = ("-m", "Sequential(Linear(4,5))")
    assert "no module class nothing in own" in cli("replace", "0", "own.py:nothing()", *words, code=2).err


def test_a_builder_in_an_expression_downloads_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_given: object) -> None:
        raise AssertionError("nothing is downloaded")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    cli("replace", "0", "torchvision.models:fcn_resnet50()", "-m", "Sequential(ReLU())", "--check", "none")
    error = cli("replace", "0", "torchvision.models:resnet18(weights='DEFAULT')", "-m", "Sequential(ReLU())", code=2)
    assert "weights is not an argument here" in error.err


# --- what is not taken over -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_own")
def test_a_note_names_lost_children_and_a_lost_forward(cli: Cli) -> None:
    told = cli(
        "replace", "bn", "SyncBatchNorm(_,eps=_,momentum=_)", "--keep-weights", "-m", "own.py:Net", "--check", "none"
    ).err
    assert "bn: the old Act had 2 children (drop Identity, act SiLU) and its own forward, which the new one" in told


def test_a_note_names_lost_hooks(cli: Cli, folder: Path) -> None:
    (folder / "hooked.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Linear(4, 4), nn.utils.spectral_norm(nn.Linear(4, 4)))\n"
        "        self[0].register_forward_hook(lambda module, args, out: out * 2)\n"
    )
    for path in "01":
        told = cli("replace", path, "Linear(_,_)", "-m", "hooked.py:Net", "--input-size", "1,4").err
        assert f"{path}: the old Linear had 1 hook, which the new one does not have" in told


def test_no_note_if_nothing_is_lost(cli: Cli) -> None:
    assert "the old" not in cli("replace", "fc", "Linear(_,10)", "-m", "resnet18").err
    assert "note" not in cli("replace", "relu", "GELU()", "-m", "resnet18").err
    assert "its own forward" in cli("replace", "layer1.0", "Identity()", "-m", "resnet18").err


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("Embedding(5,4,max_norm=1.0)", "Embedding(_,_)", "max_norm was 1.0 and is None now: max_norm=_ keeps it"),
        ("Embedding(5,4,padding_idx=1)", "Embedding(_,_)", "padding_idx was 1 and is None now"),
        ("BatchNorm1d(4,momentum=None)", "BatchNorm1d(_)", "momentum was None and is 0.1 now"),
        ("BatchNorm1d(4)", "BatchNorm1d(_,momentum=None)", ""),
        ("Conv2d(3,8,3,2,1)", "Sequential(Conv2d(_,_,_,padding=_),Dropout2d(0.1))", "stride was (2, 2) and is (1, 1)"),
        ("BatchNorm2d(4,momentum=0.5)", "GroupNorm(2,4)", "momentum=0.5 is lost: the new module has no such"),
        ("MultiheadAttention(4,2,batch_first=True)", "MultiheadAttention(_,_)", "batch_first was True and is False"),
    ],
)
def test_a_note_names_lost_settings(cli: Cli, old: str, new: str, told: str) -> None:
    shown = cli("replace", "0", new, "-m", f"Sequential({old})", "--check", "none").err
    assert told in shown
    assert bool(told) == (" now" in shown or "lost" in shown)


def test_the_suggested_argument_keeps_the_setting(cli: Cli) -> None:
    new = "Sequential(Conv2d(_,_,_,padding=_,stride=_),Dropout2d(0.1))"
    assert "stride" not in cli("replace", "conv1", new, "-m", "resnet18").err


def test_a_note_says_that_a_partly_frozen_layer_becomes_trainable(cli: Cli) -> None:
    cli("freeze", "fc.weight", "-m", "resnet18", "-o", "part.pth", "-q")
    told = cli("replace", "fc", "Linear(_,10)", "-m", "part.pth").err
    assert "fc.weight was frozen, what is new trains: freeze fc.weight keeps it so" in told
    edits = ("-e", "replace fc Linear(_,10)", "-e", "freeze fc.weight")
    assert "fc.weight was frozen, what" in cli("apply", *edits, "-m", "part.pth", "-o", "out.pth").err
    assert [name for name, p in modelcli.load("out.pth").named_parameters() if not p.requires_grad] == ["fc.weight"]


# --- --keep-weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("LSTM(3,4)", "GRU(_,_)", "has another meaning in GRU: LSTM is a recurrent layer of the kind LSTM"),
        ("LSTM(3,4)", "LSTM(_,6)", "has a block for each gate, but hidden_size was 4 and is 6 now"),
        ("Conv2d(3,3,3)", "ConvTranspose2d(_,_,_)", "Conv2d is a convolution, ConvTranspose2d a transposed"),
        ("Conv2d(3,8,3)", "Conv2d(_,_,5)", "the sizes 3x3 and 5x5: the old one would fill only a corner"),
        ("Conv2d(4,8,3,groups=2)", "Conv2d(_,_,_)", "has 2 groups of channels, but 1 in the new module"),
        ("Embedding(4,4)", "Linear(4,4)", "Embedding is an embedding, Linear a linear layer"),
        ("BatchNorm2d(4)", "LayerNorm(4)", "BatchNorm2d is a norm over channels, LayerNorm a norm over the last axes"),
        ("PReLU(4)", "BatchNorm1d(4)", "weight of PReLU has another meaning in BatchNorm1d"),
        ("MultiheadAttention(4,2)", "MultiheadAttention(8,2)", "stacks queries, keys and values"),
    ],
)
def test_weights_with_another_meaning_are_not_kept(cli: Cli, old: str, new: str, why: str) -> None:
    words = ("--keep-weights", "-m", f"Sequential({old})", "--check", "none", "--json")
    error = cli("replace", "0", new, *words, code=2).error
    assert error["message"].startswith("--keep-weights cannot carry over 0: ")
    assert why in error["message"]


def kept(old: nn.Module, new: str) -> nn.Module:
    model = nn.Sequential(old)
    torch.manual_seed(5)
    return modelcli.apply(model, f"replace 0 {new} --keep-weights")[0]


def test_a_transposed_linear_layer_keeps_its_weights_transposed() -> None:
    """The outputs in plain PyTorch are equal."""
    old = own("GPT")[0]
    x = torch.randn(3, 4)
    new = kept(old, "Linear(4,5)")
    assert torch.allclose(new(x), old(x))
    assert torch.equal(new.weight, old.weight.t())
    narrow = kept(old, "Linear(4,2)")
    assert torch.allclose(narrow(x), old(x)[:, :2])


@pytest.mark.usefixtures("_own")
def test_the_transposed_values_reach_the_file(cli: Cli) -> None:
    cli("replace", "0", "Linear(4,5)", "--keep-weights", "-m", "own.py:GPT", "--seed", "3", "-o", "out.pth")
    cli("save", "old.pth", "-m", "own.py:GPT", "--seed", "3", "-q")
    old, new = (torch.load(name, weights_only=True) for name in ("old.pth", "out.pth"))
    assert torch.equal(new["0.weight"], old["0.weight"].t())
    assert torch.equal(new["0.bias"], old["0.bias"])
    edit = ("-e", "replace 0 Linear(4,5) --keep-weights")
    Path("work.py").write_text(cli("script", *edit, "-m", "own.py:GPT", "--seed", "3", "-o", "script.pth").out)
    subprocess.run([sys.executable, "work.py"], check=True, capture_output=True)
    assert torch.equal(torch.load("script.pth", weights_only=True)["0.weight"], new["0.weight"])


def test_norms_carry_over_to_norms() -> None:
    old = nn.BatchNorm2d(4)
    nn.init.normal_(old.weight)
    old.running_mean.normal_()
    assert torch.equal(kept(old, "SyncBatchNorm(_)").running_mean, old.running_mean)
    assert torch.equal(kept(old, "GroupNorm(2,4)").weight, old.weight)


def test_more_inputs_of_a_recurrent_layer_keep_its_gates() -> None:
    old = nn.LSTM(3, 4, 2)
    new = kept(old, "LSTM(5,4,2)")
    assert torch.equal(new.weight_ih_l0[:, :3], old.weight_ih_l0)
    assert torch.equal(new.weight_hh_l1, old.weight_hh_l1)


def test_depthwise_channels_are_carried_over_one_by_one() -> None:
    old = nn.Conv2d(4, 4, 3, groups=4)
    new = kept(old, "Conv2d(6,6,3,groups=6)")
    assert torch.equal(new.weight[:4], old.weight)
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        assert torch.allclose(new(x)[:, :4], functional.conv2d(x[:, :4], old.weight, old.bias, groups=4), atol=1e-6)


def test_only_kept_weights_are_reported_as_kept() -> None:
    with pytest.raises(RequestError, match="cannot carry over"):
        kept(nn.LSTM(3, 3), "RNN(3,3)")


def test_each_tied_module_counts_by_its_own_names(cli: Cli) -> None:
    """Each of two modules that are replaced together counts only its own ties."""
    weight = torch.ones(3, 3)
    torch.save(
        {"a.weight": weight, "b.weight": torch.zeros(2), "c.weight": weight, "d.weight": torch.ones(1)}, "bare.pth"
    )
    message = cli("replace", "{a,b}", "Linear(2,2)", "-m", "bare.pth", code=2).err
    assert "a.weight is tied to c.weight, and replacing a unties them" in message
    assert "is tied" not in cli("replace", "{b,d}", "Linear(2,2)", "-m", "bare.pth").err
