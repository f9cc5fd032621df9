"""fuse: compared with torch.nn.utils.fusion on the pairs that a reader of the model's code would name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import fusion, parametrizations
from torch.utils.checkpoint import checkpoint

import modelcli
from modelcli.errors import RequestError
from tests.conftest import Cli


def unusual(model: nn.Module) -> nn.Module:
    """Give the BatchNorms of a model statistics, weights and biases that no constructor gives, and eval mode."""
    draw = torch.Generator().manual_seed(7)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            for name, low in (("running_mean", -0.5), ("running_var", 0.5), ("weight", 0.5), ("bias", -0.5)):
                if getattr(module, name) is not None:
                    getattr(module, name).data.uniform_(low, low + 1, generator=draw)
    return model.eval()


def by_torch(model: nn.Module, pairs: dict[str, str]) -> nn.Module:
    """Fold with torch.nn.utils.fusion. `pairs` are the paths of the layers and of the BatchNorms behind them."""
    made = deepcopy(model)
    for layer, norm in pairs.items():
        old: Any = made.get_submodule(layer)
        bn: Any = made.get_submodule(norm)
        if isinstance(old, nn.Linear):
            new: nn.Module = fusion.fuse_linear_bn_eval(old, bn)
        else:
            new = fusion.fuse_conv_bn_eval(old, bn, isinstance(old, nn.modules.conv._ConvTransposeNd))
        made.set_submodule(layer, new)
        made.set_submodule(norm, nn.Identity())
    return made


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(found: nn.Module, before: nn.Module, x: torch.Tensor) -> None:
    """Whether the outputs in eval mode are equal to 1e-5, relative to the largest one."""
    with torch.no_grad():
        new, old = found.eval()(x), before.eval()(x)
    assert (new - old).abs().max() <= 1e-5 * old.abs().max().clamp(min=1)
    assert old.abs().max() > 0


def norms_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "BatchNorm" in type(module).__name__]


# --- models of the libraries -----------------------------------------------------------------------------------------


def densely_connected() -> nn.Module:
    return torchvision.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=5)


#: The model, and the ends of the names of the BatchNorms that stay.
BUILDERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    # The first one of each layer follows a concatenation; that of a transition and the last one do as well.
    "DenseNet": (densely_connected, ("norm1", ".norm", "norm5")),
    "mobilenet_v2": (partial(torchvision.models.mobilenet_v2, width_mult=0.25), ()),
    "timm efficientnet_lite0": (partial(timm.create_model, "efficientnet_lite0"), ()),  # the activation is in the norm
    "densenet121": (torchvision.models.densenet121, ("norm1", ".norm", "norm5")),
    "googlenet": (partial(torchvision.models.googlenet, init_weights=False), ("aux1.conv.bn", "aux2.conv.bn")),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, ()),
    "regnet": (torchvision.models.regnet_y_400mf, ()),
    "vgg11_bn": (torchvision.models.vgg11_bn, ()),
    "timm resnet18": (partial(timm.create_model, "resnet18"), ()),
    "timm tf_efficientnet_lite0": (partial(timm.create_model, "tf_efficientnet_lite0"), ()),  # it pads by itself
    "timm densenet121": (partial(timm.create_model, "densenet121"), ("norm1", ".norm", "norm5")),
}
ALWAYS = ("DenseNet", "mobilenet_v2", "timm efficientnet_lite0")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ALWAYS else pytest.mark.sweep) for case in BUILDERS]
)
def test_a_model_of_a_library_computes_the_same(case: str) -> None:
    make, stay = BUILDERS[case]
    before = unusual(make())
    after = modelcli.apply(deepcopy(before), "fuse .", input_size=(1, 3, 64, 64))
    assert (
        norms_of(after) == [name for name in norms_of(before) if name.endswith(stay)] if stay else not norms_of(after)
    )
    assert len(norms_of(after)) < len(norms_of(before))
    assert_close(after, before, torch.randn(1, 3, 64, 64))


#: The pairs of resnet18, as its code names them.
RESNET = {"conv1": "bn1"} | {
    f"layer{stage}.{block}.{layer}": f"layer{stage}.{block}.{norm}"
    for stage in range(1, 5)
    for block in range(2)
    for layer, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("downsample.0", "downsample.1"))
    if not layer.startswith("down") or (stage > 1 and block == 0)
}


def test_the_values_are_those_of_torch() -> None:
    before = unusual(torchvision.models.resnet18())
    after = modelcli.apply(deepcopy(before), "fuse .", input_size=(1, 3, 64, 64))
    assert_same(after, by_torch(before, RESNET))
    part = {layer: norm for layer, norm in RESNET.items() if layer.startswith("layer1")}
    for words in ("fuse layer1", "fuse 'layer1.**:BatchNorm2d'", "fuse . --except bn1 --except layer{2,3,4}"):
        assert_same(modelcli.apply(deepcopy(before), words, input_size=(1, 3, 64, 64)), by_torch(before, part))


# --- layers and dtypes -----------------------------------------------------------------------------------------------


def sequence(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d": (lambda: sequence(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    "Conv2d": (lambda: sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "Conv3d": (lambda: sequence(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), (2, 4, 5, 5, 5)),
    "no bias": (lambda: sequence(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "groups": (lambda: sequence(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "padding": (lambda: sequence(nn.Conv2d(4, 6, 3, 1, 1, padding_mode="reflect"), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "same": (lambda: sequence(nn.Conv2d(4, 6, 4, padding="same"), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "no affine": (lambda: sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False, eps=0.1)), (2, 4, 9, 9)),
    "transposed": (lambda: sequence(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "Linear": (lambda: sequence(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4)),
    "Linear, no bias": (lambda: sequence(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)), (3, 4)),
    "SyncBatchNorm": (lambda: sequence(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), (2, 4, 9, 9)),
    "through Identity": (lambda: sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Identity()), (2, 4, 9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_and_dtype(layer: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[layer]
    before = unusual(make()).to(dtype)
    after = modelcli.apply(deepcopy(before), "fuse .", input_size=shape)
    assert_same(after, by_torch(before, {"0": "1"}))
    assert type(after[1]) is nn.Identity
    assert not after[1].training
    if dtype == torch.float32:
        assert_close(after, before, torch.randn(shape))


def test_a_linear_layer_before_a_norm_without_weights() -> None:
    """torch's function needs a weight and a bias of the BatchNorm here."""
    before = unusual(sequence(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)))
    with_weights = deepcopy(before)
    with_weights[1] = nn.BatchNorm1d(6).eval()
    with_weights[1].load_state_dict(before[1].state_dict(), strict=False)
    after = modelcli.apply(deepcopy(before), "fuse .", input_size=(3, 4))
    assert_same(after, by_torch(with_weights, {"0": "1"}))
    assert_close(after, before, torch.randn(3, 4))


def test_frozen_batch_norms_of_torchvision() -> None:
    before = unusual(sequence(nn.Conv2d(4, 6, 3), torchvision.ops.FrozenBatchNorm2d(6)))
    after = modelcli.apply(deepcopy(before), "fuse .", input_size=(2, 4, 9, 9))
    assert_close(after, before, torch.randn(2, 4, 9, 9))
    assert type(after[1]) is nn.Identity


def test_the_activation_inside_a_norm_of_timm_stays() -> None:
    from timm.layers import BatchNormAct2d

    before = unusual(sequence(nn.Conv2d(4, 6, 3), BatchNormAct2d(6, act_layer="silu")))
    after = modelcli.apply(deepcopy(before), "fuse .", input_size=(2, 4, 9, 9))
    assert type(after[1]) is nn.SiLU
    assert_close(after, before, torch.randn(2, 4, 9, 9))


def test_flags_stay() -> None:
    """The folded weight trains if the weight did; a bias that is new if that of the BatchNorm did."""
    for frozen, expected in (((), (True, True)), (("0.weight",), (False, True)), (("1.bias",), (True, False))):
        model = sequence(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        modelcli.apply(model, "fuse .", input_size=(2, 4, 9, 9))
        assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == expected
    model = sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    model[0].bias.requires_grad_(False)
    modelcli.apply(model, "fuse .", input_size=(2, 4, 9, 9))
    assert not model[0].bias.requires_grad


# --- what goes where -------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A convolution and a BatchNorm. What subclasses do between them decides whether they can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> Any:
        return self.bn(self.conv(x))


class Functional(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.relu(self.bn(nn.Dropout()(self.conv(x)) if self.training else self.conv(x)))


class Checkpointed(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(lambda y: self.bn(self.conv(y)), x, use_reentrant=False)


class Twice(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        return self.bn(self.conv(self.bn(self.conv(x))))


class Skip(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + y


class SkipModule(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + self.relu(y)


class Returned(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return {"out": self.bn(y), "features": [y]}


class Kept(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        self.features = self.conv(x)
        return self.bn(self.features)


class Sliced(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        return self.bn(self.conv(x)[:, :, 1:])


class InPlace(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        return self.bn(self.conv(x).relu_())


class TwoInputs(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        return self.bn(self.conv(x)) + self.bn(x)


class TwoNorms(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + self.other(y)


class WeightRead(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        return self.bn(self.conv(x)) + self.conv.weight.mean()


class NormOnly(Pair):
    def forward(self, x: torch.Tensor) -> Any:
        return self.conv(self.bn(x))


class Tied(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.same.weight = self.conv.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.bn(self.conv(x)) + self.same(x)


class Standardized(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


class WithStandardized(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardized(3, 3, 3)


class Biasless(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight, padding=1)


class WithBiasless(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Biasless(3, 3, 3, bias=False)


class Scaled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mul_(2)


class WithScaled(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Scaled(3, 3, 3, padding=1)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class WithOwnNorm(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.bn = OwnNorm(3)


class AlongTheSecondAxis(nn.Module):
    """The BatchNorm normalises the second axis of three, and the linear layer computes the third one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(3, 3)
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.bn(self.conv(x[:, :, 0]))


class Unbatched(nn.Module):
    """A convolution without a batch, whose length the BatchNorm normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.bn(self.conv(x[0, :, 0]))


def hooked(model: nn.Module) -> nn.Module:
    model.conv.register_forward_hook(lambda module, args, output: output * 2)
    return model


def normed(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model.conv)
    return model


def watched(model: nn.Module) -> nn.Module:
    model.bn.register_forward_pre_hook(lambda module, args: None)
    return model


def in_train_mode(model: nn.Module) -> nn.Module:
    model.bn.train()
    return model


def replaced(model: nn.Module) -> nn.Module:
    model.conv.forward = lambda x: x
    return model


def with_norm(norm: nn.Module) -> nn.Module:
    model = Pair()
    model.bn = norm
    return unusual(model)


def with_layer(layer: nn.Module) -> nn.Module:
    model = Pair()
    model.conv = layer
    return unusual(model)


@pytest.mark.parametrize("kind", [Pair, Functional, Checkpointed, Twice])
def test_a_pair_is_folded(kind: type[Pair]) -> None:
    before = unusual(kind())
    after = modelcli.apply(deepcopy(before), "fuse .", input_size=(2, 3, 3, 3))
    assert_same(after, by_torch(before, {"conv": "bn"}))
    assert_close(after, before, torch.randn(2, 3, 3, 3))


def test_a_pair_under_two_names_is_folded_once() -> None:
    pair = sequence(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    before = unusual(sequence(pair, nn.ReLU(), pair))
    after = modelcli.apply(deepcopy(before), "fuse .", input_size=(2, 3, 5, 5))
    assert after[0][0] is after[2][0]
    assert after[0][1] is after[2][1]
    assert_same(after[0], by_torch(before[0], {"0": "1"}))
    assert_close(after, before, torch.randn(2, 3, 5, 5))


ELSEWHERE = "bn: what conv gives also goes into "
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "skip": (Skip, f"{ELSEWHERE}add in ."),
    "skip module": (SkipModule, f"{ELSEWHERE}relu"),
    "returned": (Returned, f"{ELSEWHERE}the output of the model"),
    "kept": (Kept, f"{ELSEWHERE}something that keeps it after the forward pass"),
    "sliced": (Sliced, f"{ELSEWHERE}slice in ."),
    "in place": (InPlace, f"{ELSEWHERE}relu_ in ."),
    "two inputs": (TwoInputs, "bn: it is called several times, and not only on what conv gives"),
    "two norms": (TwoNorms, f"{ELSEWHERE}other; other: what conv gives also goes into bn"),
    "weight read": (WeightRead, "bn: conv has a weight that mean in . uses too"),
    "norm before": (NormOnly, "bn: what flows in is not the output of a convolution or linear layer"),
    "tied": (Tied, "bn: conv.weight shares its values with same.weight"),
    "standardized": (WithStandardized, "bn: conv has a forward that does more than a convolution"),
    "bias not added": (WithBiasless, "bn: conv has a forward that does more than a convolution"),
    "scaled": (WithScaled, f"{ELSEWHERE}conv"),
    "own norm": (WithOwnNorm, "bn: modelcli does not know what the forward of OwnNorm computes"),
    "second axis": (AlongTheSecondAxis, "bn: conv gives 3 dimensions, of which a BatchNorm normalises another one"),
    "no batch": (Unbatched, "bn: conv gives 2 dimensions, of which a BatchNorm normalises another one"),
    "hooks": (lambda: hooked(Pair()), "bn: conv has hooks, which run with the old values"),
    "hooks of the norm": (lambda: watched(Pair()), "bn: the BatchNorm2d has hooks, which run with the old values"),
    "parametrized": (lambda: normed(Pair()), "bn: conv has a parametrization, which computes its tensors anew"),
    "forward": (lambda: replaced(Pair()), "bn: conv has a forward of its own"),
    "no statistics": (
        lambda: with_norm(nn.BatchNorm2d(3, track_running_stats=False)),
        "bn: the BatchNorm2d has no running statistics, so it uses those of each batch",
    ),
    "train mode": (
        lambda: in_train_mode(unusual(Pair())),
        "bn: the BatchNorm2d is in train mode while the model is in eval mode, so it uses the statistics of each batch",
    ),
    "groups": (
        lambda: with_layer(nn.ConvTranspose2d(3, 3, 3, padding=1, groups=3)),
        "bn: conv is a transposed convolution with 3 groups, which torch.nn.utils.fusion cannot fold",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_says_why(case: str) -> None:
    make, why = REFUSED[case]
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RequestError) as refused:
        modelcli.apply(model, "fuse .", input_size=(2, 3, 3, 3))
    assert refused.value.message.removeprefix("nothing to fuse: ") == why
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_an_input_neighbours_in_a_sequential_are_certain() -> None:
    before = unusual(sequence(sequence(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.BatchNorm2d(4)))
    after = modelcli.apply(deepcopy(before), "fuse .")
    assert norms_of(after) == ["1"]
    assert_close(after, before, torch.randn(2, 3, 5, 5))
    # What a BatchNorm1d normalises depends on the shape of the input.
    for model in (sequence(nn.Linear(3, 4), nn.BatchNorm1d(4)), Pair()):
        with pytest.raises(RequestError) as refused:
            modelcli.apply(model, "fuse .")
        assert refused.value.message == (
            "no forward pass shows which layer is before each BatchNorm: the input size is not known"
        )
        assert refused.value.hint == "pass --input-size, batch included"


def test_the_layer_can_be_named() -> None:
    before = unusual(Pair())
    for size in (None, (2, 3, 5, 5)):
        after = modelcli.apply(deepcopy(before), "fuse bn --into conv", input_size=size)
        assert_same(after, by_torch(before, {"conv": "bn"}))
    with pytest.raises(RequestError, match="what conv gives also goes into add"):
        modelcli.apply(Skip(), "fuse bn --into conv", input_size=(2, 3, 5, 5))
    two = sequence(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    with pytest.raises(RequestError, match="2: the layer before it is 1, not 0"):
        modelcli.apply(two, "fuse 2 --into 0", input_size=(2, 3, 5, 5))
    with pytest.raises(RequestError, match="relu is neither a convolution nor a linear layer"):
        modelcli.apply(Pair(), "fuse bn --into relu")
    with pytest.raises(RequestError, match="2 targets and 1 --into"):
        modelcli.apply(TwoNorms(), "fuse bn other --into conv")
    with pytest.raises(RequestError, match="conv is no BatchNorm"):
        modelcli.apply(Pair(), "fuse conv --into bn")
    with pytest.raises(RequestError, match="conv has 3 outputs, and the BatchNorm is not over these"):
        modelcli.apply(with_norm(nn.BatchNorm2d(4)), "fuse bn --into conv")


# --- commands --------------------------------------------------------------------------------------------------------


SMALL = "Sequential(Conv2d(3,4,3,bias=False),BatchNorm2d(4),ReLU(),Conv2d(4,4,3),BatchNorm2d(4))"
PAIRS = {"0": "1", "3": "4"}
ON_FILE = ("-m", "a.pth", "--arch", SMALL, "--input-size", "2,3,9,9")


@pytest.fixture
def trained(folder: Path) -> nn.Module:
    """A model with unusual statistics and a frozen weight, and the file `a.pth` of its state dict."""
    first = nn.Conv2d(3, 4, 3, bias=False)
    model = unusual(sequence(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    torch.save(model.state_dict(), folder / "a.pth")
    return model


def test_a_file_a_record_a_recipe_and_a_script(cli: Cli, trained: nn.Module) -> None:
    truth = by_torch(trained, PAIRS)
    told = cli("apply", "-e", "freeze 0.weight", "-e", "fuse .", *ON_FILE, "-o", "out.pth")
    assert "2 BatchNorms are folded into the layers before them" in told.err
    assert "-> Identity(), folded into 0" in " ".join(told.out.split())
    assert "outputs:" in cli("fuse", ".", *ON_FILE, "--check", "same", "-o", "same.pth").out
    loaded = modelcli.load("out.pth")
    assert_same(loaded, truth)
    assert not loaded[0].weight.requires_grad
    assert loaded[0].bias.requires_grad
    assert_close(loaded, trained, torch.randn(2, 3, 9, 9))
    plain = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(plain[name], tensor) for name, tensor in truth.state_dict().items())

    cli("load", *ON_FILE[1:])
    cli("freeze", "0.weight")
    cli("fuse", ".")
    assert '"fuse ."' in Path("modelcli.toml").read_text()
    cli("save", "recipe.safetensors")
    assert_same(modelcli.load("recipe.safetensors"), truth)

    script = cli("script", "-e", "freeze 0.weight", "-e", "fuse .", *ON_FILE, "-o", "script.pth").out
    exec(compile(script, "made.py", "exec"), {})
    assert_same(modelcli.load("script.pth", arch=truth), modelcli.load("out.pth"))
    assert "modelcli" not in script


def test_more_edits_on_a_folded_model(cli: Cli, trained: nn.Module) -> None:
    cli("fuse", "1", *ON_FILE, "-o", "one.pth")
    cli("fuse", ".", "-m", "one.pth", "-o", "two.pth")
    assert_same(modelcli.load("two.pth"), by_torch(trained, PAIRS))
    cli("cast", ".", "bfloat16", "-m", "two.pth", "-o", "three.pth")
    assert_same(modelcli.load("three.pth"), by_torch(trained, PAIRS).bfloat16())
    assert "has no BatchNorm" in cli("fuse", ".", "-m", "two.pth", code=2).err
    cli("script", "-e", "freeze 0", "-m", "two.pth", "-o", "script.pth")


SCRIPTED = {
    "loop": sequence(*(part for _ in range(6) for part in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))),
    "kinds": sequence(
        nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 4, bias=False),
        nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4), nn.BatchNorm1d(4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCRIPTED)
def test_the_script_gives_equal_tensors(cli: Cli, case: str) -> None:
    model = unusual(deepcopy(SCRIPTED[case]))
    torch.save(model.state_dict(), "a.pth")
    text = "Sequential(" + ",".join(str(part).replace(" ", "") for part in model.children()) + ")"
    words = ("-m", "a.pth", "--arch", text.replace("Flatten(start_dim=1,end_dim=-1)", "Flatten()"))
    more = ("--input-size", "2,3,3,3")
    cli("fuse", ".", *words, *more, "-o", "out.pth")
    script = cli("script", "-e", "fuse .", *words, *more, "-o", "script.pth").out
    exec(compile(script, "made.py", "exec"), {})
    found, made = (torch.load(name, weights_only=True) for name in ("out.pth", "script.pth"))
    assert list(found) == list(made)
    assert all(torch.equal(found[name], made[name]) for name in found)
    assert "torch.nn.utils.fusion" in script


def test_the_activation_inside_a_norm_of_timm_stays_in_a_script(cli: Cli) -> None:
    words = ("-m", "Sequential(Conv2d(3,4,3),timm.layers:BatchNormAct2d(4))", "--input-size", "2,3,5,5")
    cli("fuse", ".", *words, "-o", "out.pth")
    after = modelcli.load("out.pth")
    assert type(after[1]) is nn.ReLU
    script = cli("script", "-e", "fuse .", *words, "-o", "script.pth").out
    exec(compile(script, "made.py", "exec"), {})
    assert_same(modelcli.load("script.pth", arch=deepcopy(after)), after)


def test_an_own_class_with_a_stated_input(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    model = unusual(importlib.import_module("nets").Net())
    torch.save(model.state_dict(), "a.pth")
    words = ("-m", "a.pth", "--arch", "nets.py:Net")
    assert "pass --input-size" in cli("fuse", ".", *words, code=2).err
    cli("fuse", ".", *words, "--input-size", "1,1,4,4", "-o", "out.pth")
    assert_same(modelcli.load("out.pth", trust=True), by_torch(model, {"conv1": "bn"}))


def test_a_model_that_needs_values_makes_its_pass_on_the_cpu(cli: Cli) -> None:
    source = "import torch\nfrom torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n"
    source += "        super().__init__()\n        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)\n"
    source += "    def forward(self, x):\n        y = self.bn(self.conv(x))\n"
    source += "        return y if float(x.sum()) < 1e9 else self.conv(x)\n"
    Path("own.py").write_text(source)
    told = cli("fuse", ".", "-m", "own.py:Net", "--input-size", "1,3,4,4", "-o", "out.pth")
    assert "1 BatchNorm is folded into the layer before it" in told.err


def test_keys_alone_do_not_show_what_is_before_what(cli: Cli) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), "a.pth")
    refused = cli("fuse", ".", "-m", "a.pth", code=2).err
    assert "fuse needs the classes of the modules, but the file records no architecture" in refused
    assert "--arch names it" in refused


def test_nothing_to_fuse(cli: Cli) -> None:
    refused = cli("fuse", ".", "-m", "alexnet", code=2).err
    assert "nothing to fuse: the model has no BatchNorm\n" in refused
    refused = cli("fuse", "features", "-m", "alexnet", code=2).err
    assert "nothing to fuse: features has no BatchNorm, and neither has the rest of the model" in refused
    refused = cli("fuse", "fc", "-m", "resnet18", code=2).err
    assert "nothing to fuse: fc has no BatchNorm" in refused
    assert "hint: fuse bn1" in refused
    cli("fuse", "bn1", "-m", "resnet18")
    refused = cli("fuse", ".", "--expect", "21", "-m", "resnet18", code=2).err
    assert "20 BatchNorms match, not the 21 expected" in refused


def test_a_note_says_what_was_not_folded(cli: Cli) -> None:
    told = cli("fuse", ".", "-m", "googlenet").err
    assert "note: 57 BatchNorms are folded into the layers before them" in told
    assert "not folded: aux1.conv.bn, aux2.conv.bn: the forward pass in eval mode does not call it" in told


def test_a_layer_takes_one_norm() -> None:
    model = modelcli.apply(unusual(TwoNorms()), "fuse bn other --into conv --into conv")
    assert norms_of(model) == ["other"]
    with pytest.raises(RequestError, match="1 BatchNorm matches, not the 2 expected: bn"):
        modelcli.apply(TwoNorms(), "fuse bn other --into conv --into conv --expect 2")
