"""set: compared with the assignment that plain PyTorch makes, and with a module that its constructor makes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

import modelcli
from modelcli import edits
from modelcli.edits.set import Set
from modelcli.errors import RequestError
from tests.conftest import Cli

OWN = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width=4, p=0.5, scale=2.0, depth=1):
        super().__init__()
        self.width, self.p, self.scale, self.depth = width, p, scale, depth
        self.drop = nn.Dropout(p)
        self.lin = nn.Linear(width, width)
        self.extra = nn.Linear(width, width)
        self.unused = 3
        self.limits = (0, 6)

    def forward(self, x):
        x = self.drop(self.lin(x)) * self.scale
        return x if self.extra is None else self.extra(x).clamp(*self.limits)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.again = self.block

    def forward(self, x):
        return self.again(self.block(x))
"""


def plain(value: Any) -> Any:
    """Return the attributes that are plain data."""
    return {name: item for name, item in vars(value).items() if "weight" not in name and _is_plain(item)}


def _is_plain(item: Any) -> bool:
    return isinstance(item, int | float | str | None) or (isinstance(item, tuple | list) and all(map(_is_plain, item)))


# --- settings of torch's modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "words", "new"),
    [
        (lambda: nn.Dropout(0.5), ("p=0.1",), lambda: nn.Dropout(0.1)),
        (lambda: nn.Conv2d(2, 3, 3, stride=2), ("stride=1",), lambda: nn.Conv2d(2, 3, 3)),
        (lambda: nn.Conv2d(2, 3, 3), ("stride=(1,2)", "padding=1"), lambda: nn.Conv2d(2, 3, 3, (1, 2), 1)),
        (
            lambda: nn.Conv2d(2, 3, 3, padding=(1, 2)),
            ("padding_mode=reflect",),
            lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"),
        ),
        (lambda: nn.Conv1d(2, 3, 3), ("padding=same",), lambda: nn.Conv1d(2, 3, 3, padding="same")),
        (lambda: nn.BatchNorm2d(3), ("momentum=0.01", "eps=1e-3"), lambda: nn.BatchNorm2d(3, 1e-3, 0.01)),
        (lambda: nn.BatchNorm2d(3), ("momentum=None",), lambda: nn.BatchNorm2d(3, momentum=None)),
        (lambda: nn.LayerNorm(3), ("eps=1e-6",), lambda: nn.LayerNorm(3, 1e-6)),
        (lambda: nn.LSTM(2, 3, 2), ("dropout=0.25",), lambda: nn.LSTM(2, 3, 2, dropout=0.25)),
        (lambda: nn.GRU(2, 3), ("batch_first=True",), lambda: nn.GRU(2, 3, batch_first=True)),
        (lambda: nn.MultiheadAttention(4, 2), ("dropout=0.5",), lambda: nn.MultiheadAttention(4, 2, dropout=0.5)),
        (lambda: nn.Embedding(5, 3), ("padding_idx=-1",), lambda: nn.Embedding(5, 3, padding_idx=-1)),
        (lambda: nn.ReLU(), ("inplace=True",), lambda: nn.ReLU(inplace=True)),
        (lambda: nn.GELU(), ("approximate=tanh",), lambda: nn.GELU("tanh")),
        (lambda: nn.Upsample(scale_factor=2), ("mode=bilinear",), lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
        (lambda: nn.MaxPool2d(2), ("ceil_mode=True",), lambda: nn.MaxPool2d(2, ceil_mode=True)),
    ],
)
def test_a_module_has_what_its_constructor_would_have_given_it(old: Any, words: tuple[str, ...], new: Any) -> None:
    model = nn.Sequential(old())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modelcli.apply(model, f"set 0 {' '.join(words)}")
    assert plain(model[0]) == plain(new())
    assert repr(model[0]) == repr(new())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_statistics_stay_and_are_used_as_when_the_attribute_is_assigned(cli: Cli) -> None:
    told = cli("set", "**:BatchNorm2d", "track_running_stats=False", "-m", "resnet18", "-o", "out.pth")
    assert "bn1, layer1.0.bn1, layer1.0.bn2 and 17 more keep their running mean and variance" in told.err
    found, expected = modelcli.load("out.pth"), models.resnet18()
    expected.load_state_dict(torch.load("out.pth", weights_only=True))
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    x = torch.randn(2, 3, 64, 64)
    for train in (True, False):
        assert torch.equal(found.train(train)(x), expected.train(train)(x))
    assert torch.equal(found.bn1.running_mean, expected.bn1.running_mean)


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            "set 0 out_channels=5",
            "out_channels=5 changes 0.weight, and set changes no tensor",
            "'Conv2d(_,5,_)' --keep",
        ),
        ("set 0 groups=2", "groups=2 changes 0.weight", "replace 0 'Conv2d(_,_,_,groups=2)'"),
        ("set 0 bias=False", "bias=False changes 0.bias", "replace 0 'Conv2d(_,_,_,bias=False)' --keep-weights"),
        ("set 1 affine=False", "affine=False changes 1.weight", "replace 1 'BatchNorm2d(_,affine=False)'"),
        ("set 2 p=2", "Dropout at 2: Dropout(p=2): dropout probability has to be between 0 and 1", "Dropout(p: float"),
        ("set 2 q=2", "Dropout at 2 has no setting 'q'", "it has p, inplace"),
        ("set 2 training=False", "training is the mode of a module", "call .train() or .eval()"),
        ("set 0 weight=None", "0.weight is a tensor, and set changes no tensor", "init draws"),
        ("set . 0=None", "takes at least one target and one setting", "set '**:Dropout' p=0.1"),
        ("set 2 inplace=yes", "inplace is True or False, not 'yes'", "inplace=True"),
        ("set 2 p", "takes at least one target and one setting", "set '**:Dropout'"),
        ("set p=0.1", "takes at least one target and one setting", "set '**:Dropout'"),
        ("set 2 p=0.1 3", "'3' is no setting", "set '**:Dropout'"),
        ("set 2 p=0.1 p=0.2", "p is given twice", None),
        ("set 2 p=_", "_ stands for an old value", "leave it out"),
        ("set 2 p=ReLU()", "a setting is a number", "replace puts a module in"),
        ("set 2 p=", "p= has no value", "p=None"),
    ],
)
def test_what_is_refused(line: str, message: str, hint: str | None) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    before = repr(model)
    with pytest.raises(RequestError) as caught:
        modelcli.apply(model, line)
    told = f"{caught.value.message} {caught.value.hint}"
    assert message in told
    assert hint is None or hint in told
    assert repr(model) == before


@pytest.mark.parametrize("setting", ["out_channels=5", "groups=2", "bias=False", "kernel_size=3"])
def test_the_hint_of_a_refusal_runs(setting: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1, padding=1))
    with pytest.raises(RequestError) as caught:
        modelcli.apply(model, f"set 0 {setting}")
    assert caught.value.hint is not None
    modelcli.apply(model, caught.value.hint)
    name, value = setting.split("=")
    found = {"kernel_size": str(model[0].kernel_size[0]), "bias": str(model[0].bias is not None)}
    assert found.get(name, str(getattr(model[0], name))) == value
    assert model[0].padding == (1, 1)


def test_a_parametrized_module_keeps_its_shapes() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 1)))
    modelcli.apply(model, "set 0 stride=2")
    assert model[0].stride == (2, 2)
    with pytest.raises(RequestError, match=r"groups=2 changes 0\.weight"):
        modelcli.apply(model, "set 0 groups=2")


# --- classes of one's own, and of libraries ------------------------------------------------------------------------


@pytest.fixture
def own(folder: Path) -> Path:
    (folder / "own.py").write_text(OWN)
    return folder


def test_attributes_that_forward_reads(cli: Cli, own: Path) -> None:
    told = cli("set", "block", "scale=3", "limits=(0,1)", "-m", "own.py:Net", "-o", "out.pth", "--input", "1,4")
    assert "scale=2.0, limits=(0,6)  ->  scale=3, limits=(0,1)" in told.out
    assert "block is one module with 2 names (block, again)" in told.err
    assert "a state dict does not hold settings" in told.err
    loaded = modelcli.load("out.pth", trust=True)
    assert (loaded.block.scale, loaded.again.limits) == (3, (0, 1))


def test_what_the_constructor_derives_follows(own: Path) -> None:
    sys.path.insert(0, str(own))
    from own import Net  # type: ignore[import-not-found]

    model = Net()
    modelcli.apply(model, "set block p=0.25")
    assert (model.block.p, model.block.drop.p) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("unused=4", "unused of Block at block is read only when the module is made"),
        ("depth=2", "depth of Block at block is read only when the module is made"),
        ("width=8", "width=8 changes block.lin.weight"),
        ("scale=text", "scale of Block at block is 2.0, and 'text' is of another type"),
        ("limits=(1,2,3)", "limits of Block at block is (0, 6), and (1, 2, 3) is of another type"),
        ("lin=3", "block.lin is a module, and set gives it no value but None"),
        ("forward=None", "Block at block has no setting 'forward'"),
        ("_modules=None", "Block at block has no setting '_modules'"),
    ],
)
def test_what_is_refused_of_a_class_of_one_s_own(cli: Cli, own: Path, words: str, message: str) -> None:
    assert message in cli("set", "block", words, "-m", "own.py:Net", code=2).err


def test_hugging_face_and_timm_modules_have_settings_too() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit")
    modelcli.apply(model, "set '**:Dropout' p=0.125")
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.125}


# --- children that become None -------------------------------------------------------------------------------------


def test_auxiliary_heads_off(cli: Cli) -> None:
    cli("apply", "-m", "googlenet", "-o", "out.pth", "-e", "set . aux1=None aux2=None", "-e", "set . aux_logits=False")
    expected = models.googlenet(weights=None, init_weights=False, aux_logits=True)
    expected.aux1 = expected.aux2 = None
    expected.aux_logits = False
    found = modelcli.load("out.pth")
    assert list(found.state_dict()) == list(expected.state_dict())
    assert not found.aux_logits
    expected.load_state_dict(torch.load("out.pth", weights_only=True))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(found.eval()(x), expected.eval()(x))


def test_aux_logits_alone_says_that_the_heads_stay(cli: Cli) -> None:
    told = cli("set", ".", "aux_logits=False", "-m", "googlenet").err
    assert "aux1, aux2 and their tensors stay: set . aux1=None aux2=None takes them out" in told


@pytest.mark.parametrize("edit", ["set . aux_classifier=None", "remove aux_classifier"])
def test_a_child_that_forward_compares_with_none_becomes_none(cli: Cli, edit: str) -> None:
    reference = "fcn_resnet50(aux_loss=True,weights_backbone=None)"
    told = cli("apply", "-m", reference, "-e", edit, "-o", "out.pth", "--input-size", "1,3,64,64")
    assert "aux_classifier  FCNHead  ->  None" in told.out
    assert re.search("check: +runs", told.out)
    found = modelcli.load("out.pth")
    assert vars(found)["_modules"]["aux_classifier"] is None
    assert not [name for name in found.state_dict() if name.startswith("aux")]


def test_a_child_that_forward_calls_goes_as_before(own: Path) -> None:
    sys.path.insert(0, str(own))
    from own import Net

    model = Net()
    modelcli.apply(model, "remove block.extra")
    assert model.block.extra is None
    modelcli.apply(model, "remove again")
    assert not hasattr(model, "again")


# --- what is written of it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [("set", "layer4.0.conv1", "stride=1"), ("set", "layer4.0.conv1", "stride=(1,1)")])
def test_the_edited_model_is_run(cli: Cli, given: tuple[str, ...]) -> None:
    assert "layer4.0 BasicBlock cannot run after the edit" in cli(*given, "-m", "resnet18", code=2).err


def test_a_value_that_is_there_already_is_said_to_be(cli: Cli) -> None:
    told = cli("set", "**:Dropout", "p=0.5", "-m", "alexnet", "-o", "out.pth")
    assert "p of Dropout at classifier.0 is 0.5 already" in told.err


def test_the_script_assigns_in_plain_pytorch(cli: Cli, folder: Path) -> None:
    lines = ("set '**:BatchNorm2d' momentum=0.01", "set conv1 padding_mode=reflect padding=1", "set fc bias=True")
    words = [word for line in lines for word in ("-e", line)]
    cli("apply", "-m", "resnet18", "-o", "out.pth", *words[:4])
    text = cli("script", "-m", "resnet18", "-o", "by-script.pth", *words[:4]).out
    assert 'model.conv1.padding_mode = "reflect"' in text
    assert re.search(r"model\.conv1\._reversed_padding_repeated_twice = .1, 1, 1, 1.", text)
    (folder / "made.py").write_text(text + "\nprint(repr(model))\n")
    done = subprocess.run([sys.executable, "made.py"], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.strip() == repr(modelcli.load("out.pth"))
    one, other = (torch.load(name, weights_only=True) for name in ("out.pth", "by-script.pth"))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_targets_that_look_like_settings_are_written_with_a_backslash() -> None:
    model = nn.ModuleDict({"a=1": nn.Dropout()})
    modelcli.apply(model, r"set 'a\=1' p=0.25")
    assert model["a=1"].p == 0.25
    assert str(edits.parse(r"set 'a\=1' p=0.25")) == str(Set(targets=(r"a\=1",), settings=(("p", 0.25),)))


def test_a_child_that_the_same_edit_takes_out_is_not_said_to_stay(cli: Cli) -> None:
    words = ("-m", "googlenet", "--check", "none")
    assert "aux1, aux2 and their tensors stay" in cli("set", ".", "aux_logits=False", *words).err
    told = cli("set", ".", "aux_logits=False", "aux1=None", *words).err
    assert "aux2 and its tensors stay: set . aux2=None takes it out" in " ".join(told.split())
    assert "stay" not in cli("set", ".", "aux_logits=False", "aux1=None", "aux2=None", *words).err
