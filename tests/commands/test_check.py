"""The check before writing: errors name the module, the shape that flows in, what the module expects, and the fix."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from modelcli import checkpoints, recipe
from modelcli.cli import main
from modelcli.errors import SystemFailureError
from modelcli.language.references import Source
from modelcli.live.check import check
from modelcli.live.opening import open_live
from modelcli.live.providers import torchvision as builders
from tests.conftest import Cli
from tests.sampling import sampled


def refused(cli: Cli, folder: Path, *words: str) -> str:
    """Return the message of an edit that must fail with exit code 2 and write nothing."""
    before = sorted(path.name for path in folder.iterdir())
    error = cli(*words, "-o", "out.pth", code=2).err
    assert sorted(path.name for path in folder.iterdir()) == before
    return error


def test_one_feature_too_few(cli: Cli, folder: Path) -> None:
    error = refused(cli, folder, "replace", "classifier.6", "Linear(4095,10)", "-m", "alexnet")
    assert "classifier.6 Linear(4095, 10) does not fit" in error
    assert "[1,4096] float32 flows in (from classifier.5 ReLU" in error
    assert "it expects [*,4095]" in error
    assert "replace classifier.6 'Linear(_,10)'" in error


def test_the_suggested_fix_works(cli: Cli) -> None:
    cli("replace", "classifier.6", "Linear(_,10)", "-m", "alexnet", "--dry-run")


def test_a_module_behind_the_edited_one(cli: Cli, folder: Path) -> None:
    error = refused(cli, folder, "replace", "classifier.4", "Linear(_,2048)", "-m", "alexnet")
    assert "classifier.6 Linear(4096, 1000) does not fit: [1,2048] float32" in error
    assert "replace classifier.6 'Linear(_,1000)' too" in error


def test_wrong_channels_of_a_transposed_convolution(cli: Cli, folder: Path) -> None:
    """ConvTranspose2d with wrong channels passes on the meta device."""
    words = ("-m", "nets.py:Mixed", "--input-size", "1,1,8,8")
    error = refused(cli, folder, "replace", "deconv", "ConvTranspose2d(3,2,2)", *words)
    assert "deconv ConvTranspose2d(3, 2," in error
    assert "[1,4,8,8] float32 flows in" in error
    assert "it expects 3 channels" in error


def test_mixed_dtypes(cli: Cli, folder: Path) -> None:
    """A bfloat16 layer in a float32 model passes on the meta device."""
    error = refused(cli, folder, "replace", "classifier.6", "Linear(4096,10,dtype=torch.bfloat16)", "-m", "alexnet")
    assert "[1,4096] float32 flows in" in error
    assert "it expects bfloat16, the dtype of its parameters" in error


def test_a_dimension_that_does_not_exist(cli: Cli, folder: Path) -> None:
    """Softmax over an axis beyond the last passes on the meta device."""
    error = refused(cli, folder, "replace", "classifier.5", "Softmax(4)", "-m", "alexnet")
    assert "classifier.5 Softmax(dim=4) does not fit" in error


def test_a_residual_that_no_longer_adds_up(cli: Cli, folder: Path) -> None:
    error = refused(cli, folder, "replace", "layer1.0.conv2", "Conv2d(_,32,3,padding=1)", "-m", "resnet18")
    assert "layer1.0.bn2 BatchNorm2d(64" in error
    assert "replace layer1.0.bn2 'BatchNorm2d(_" in error


def test_without_a_known_input_a_note_says_that_nothing_was_checked(cli: Cli) -> None:
    result = cli("replace", "0", "Linear(4,3)", "-m", "Sequential(Linear(4,3),ReLU())", "--json").json
    assert result["check"]["ran"] is False
    assert "--input-size" in result["check"]["reason"]


def test_a_model_that_cannot_run_as_it_was(cli: Cli) -> None:
    """If the unedited model fails as well, the check is impossible, which is not an error."""
    words = ("-m", "Sequential(Linear(4,3),Linear(5,2))", "--input-size", "1,4")
    check = cli("replace", "1", "Linear(6,2)", *words, "--json").json["check"]
    assert check["ran"] is False
    assert check["reason"].startswith("the model cannot run before the edit either")


def test_detection_models_cannot_be_checked_on_meta(cli: Cli) -> None:
    check = cli("freeze", "backbone", "-m", "ssdlite320_mobilenet_v3_large", "--json").json["check"]
    assert check["ran"] is False
    assert "needs values" in check["reason"]


def test_none_skips_it(cli: Cli) -> None:
    cli("replace", "classifier.6", "Linear(4095,10)", "-m", "alexnet", "-o", "out.pth", "--check", "none")
    assert torch.load("out.pth", weights_only=True)["classifier.6.weight"].shape == (10, 4095)


def test_run_uses_real_numbers(cli: Cli) -> None:
    check = cli("replace", "fc", "Linear(_,10)", "-m", "resnet18", "--check", "run", "--json").json["check"]
    assert check == {"ran": True, "reason": None, "output_shape": [1, 10], "input": [[1, 3, 224, 224]]}
    error = cli("replace", "fc", "Linear(7,10)", "-m", "resnet18", "--check", "run", code=2).err
    assert "fc Linear(7, 10) does not fit: [1,512] float32 flows in (after avgpool" in error
    assert "replace fc 'Linear(_,10)' takes in_features=512" in error


def test_run_finds_errors_that_the_rules_do_not_cover(cli: Cli, folder: Path) -> None:
    words = ("-m", "Sequential(Linear(4,4),Unflatten(1,(2,2)))", "--input-size", "3,4", "--check", "run")
    error = refused(cli, folder, "replace", "1", "Unflatten(1,(3,2))", *words)
    assert "1 Unflatten cannot run after the edit: " in error
    assert "(after 0 Linear(4, 4))" in error
    assert "edited modules: 1; --check none writes the model anyway" in error


def test_an_unknown_check(cli: Cli) -> None:
    assert "pass --check meta, run, same or none" in cli("freeze", ".", "-m", "alexnet", "--check", "maybe", code=2).err


def test_token_models_take_whole_numbers(cli: Cli) -> None:
    words = ("-m", "nets.py:Tied", "--input-size", "1,7")
    check = cli("replace", "body", "Linear(_,4)", *words, "--input-dtype", "int64", "--json").json["check"]
    assert check["output_shape"] == [1, 7, 11]
    check = cli("replace", "body", "Linear(_,4)", *words, "--json").json["check"]
    assert "--input-dtype int64" in check["reason"]


@pytest.mark.parametrize("expression", ["LazyLinear(10)", "Linear(_,10)"])
def test_a_lazy_module_is_checked_too(cli: Cli, expression: str) -> None:
    check = cli("replace", "fc", expression, "-m", "resnet18", "--json").json["check"]
    assert check["output_shape"] == [1, 10]


@pytest.mark.parametrize(
    "name",
    sampled([name for name in builders.builder_names() if builders.describe(name).group != "detection"], one_in=16),
)
def test_every_builder_that_runs_passes_its_own_check(name: str) -> None:
    """No rule rejects a model of torchvision: subclasses with their own forward, unusual shapes, several inputs."""
    live = open_live(Source(name))
    assert check(lambda: (live.module, live.inputs), live.module, live.inputs, {}).ran


def test_a_subclass_with_a_forward_of_its_own_is_not_judged(cli: Cli, folder: Path) -> None:
    """torchvision's LayerNorm2d is a LayerNorm over the second dimension."""
    error = refused(cli, folder, "replace", "classifier.2", "Linear(700,5)", "-m", "convnext_tiny")
    assert "classifier.2 Linear(700, 5) does not fit: [1,768] float32 flows in" in error


def test_a_summary_says_what_does_not_fit(cli: Cli) -> None:
    out = cli("summary", "resnet18", "--input-size", "1,4,224,224").out
    reason = "the forward pass ended in conv1: [1,4,224,224] float32 flows in, it expects 3 channels"
    assert f"Not complete:               {reason}" in out
    assert "(not called)" not in out


def test_a_hole_in_a_bare_checkpoint(cli: Cli) -> None:
    torch.save({"fc.weight": torch.zeros(3, 2)}, "bare.pth")
    change = cli("replace", "fc", "Linear(_,5)", "-m", "bare.pth", "--json").json["changes"][0]
    assert change["after"] == "Linear(2, 5)"  # in_features is known from the weight
    error = cli("replace", "fc", "Conv2d(_,3,1)", "-m", "bare.pth", code=2).err
    assert "a plain state dict records no settings" in error
    assert "pass --arch REFERENCE" in error


def test_an_instance_is_run_as_it_was_and_as_it_is(cli: Cli, folder: Path) -> None:
    """For a model that exists as an instance, `--check run` must not compare the edited model with itself."""
    words = ("-m", "nets.py:instance", "--input-size", "1,3", "--check", "run")
    error = refused(cli, folder, "replace", "0", "Linear(5,2)", *words)
    assert "0 Linear(5, 2) does not fit" in error


def test_the_source_of_an_input_is_named_only_if_it_is_certain(cli: Cli, folder: Path) -> None:
    """On the shortcut of a residual block, the module that ran last is not the one whose output flows in."""
    words = ("replace", "layer2.0.downsample.0", "Conv2d(65,128,1,2,bias=False)", "-m", "resnet18")
    error = refused(cli, folder, *words)
    assert "layer2.0.downsample.0 Conv2d(65" in error
    assert "(from" not in error


def test_holes_of_recurrent_modules(cli: Cli) -> None:
    document = cli("replace", "0", "LSTM(_,5)", "-m", "Sequential(LSTM(3,4))", "--json").json
    assert document["edits"] == ["replace 0 LSTM(_,5)"]
    assert document["changes"][0]["after"].startswith("LSTM(3, 5")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("insert", "features.1", "BatchNorm2d(65)"), "insert features.1 'BatchNorm2d(_)' takes num_features=64"),
        (("append", "classifier", "Linear(31,10)"), "append classifier 'Linear(_,10)' takes in_features=1000"),
        (("replace", "classifier.6", "Linear(31,10)"), "replace classifier.6 'Linear(_,10)' takes in_features=4096"),
    ],
)
def test_the_fix_is_in_the_words_of_the_edit(cli: Cli, folder: Path, words: tuple[str, ...], hint: str) -> None:
    assert hint in refused(cli, folder, *words, "-m", "alexnet")


def test_the_error_names_the_match_that_cannot_be_replaced(cli: Cli) -> None:
    error = cli("replace", "**:BatchNorm2d", "GroupNorm(32,_)", "-m", "mobilenet_v2", code=2).err
    assert "features.1.conv.2: GroupNorm(32,16): num_channels (16) must be divisible by num_groups (32)" in " ".join(
        error.split()
    )


def test_a_class_of_a_file_in_an_expression(cli: Cli) -> None:
    change = cli("replace", "1", "nets.py:MyLinear(4,3)", "-m", "Sequential(ReLU(),Linear(4,2))", "--json").json
    assert change["changes"][0]["after"].startswith("MyLinear")


def test_a_model_that_needs_values_gets_the_hint_to_use_check_run(cli: Cli) -> None:
    words = ("replace", "body", "Linear(4,2)", "-m", "nets.py:Deciding", "--input-size", "1,4", "--json")
    assert "--check run makes the pass with values" in cli(*words).json["check"]["reason"]
    assert cli(*words, "--check", "run").json["check"]["output_shape"] == [1, 2]


def test_a_required_keyword_is_named(cli: Cli) -> None:
    words = ("-m", "nets.py:ByKeyword", "--input-size", "1,4")
    reason = cli("replace", "body", "Linear(4,2)", *words, "--json").json["check"]["reason"]
    assert "its forward also needs 'gain' by keyword" in reason
    error = cli("replace", "norm", "GroupNorm(2,_)", *words, code=2).err
    assert "_ for num_channels is not known" in error
    assert "the forward pass ended in the model itself: its forward also needs 'gain' by keyword" in error
    assert "hint: write the value of num_channels\n" in error


def test_a_hole_without_an_input(cli: Cli) -> None:
    error = cli("replace", "norm", "GroupNorm(2,_)", "-m", "nets.py:ByKeyword", code=2).err
    assert "what flows in is not known without an input size" in error
    assert "hint: write the value of num_channels, or pass --input-size" in error


@pytest.mark.parametrize("check", ["meta", "run"])
def test_a_stated_dtype_that_no_longer_fits(cli: Cli, folder: Path, check: str) -> None:
    words = ("-m", "Sequential(Linear(4,4),ReLU())", "--input-size", "1,4", "--check", check)
    error = refused(cli, folder, "replace", "0", "Linear(4,4,dtype=torch.float16)", *words, "--input-dtype", "float32")
    assert "you stated float32 as the dtype of the input: remove --input-dtype (input_dtype in a recipe)" in error
    cli("cast", ".", "half", *words, "--input-dtype", "float32")


def test_the_hint_suggests_another_input_size(cli: Cli, folder: Path) -> None:
    error = refused(cli, folder, "replace", "conv1", "Conv2d(1,64,7)", "-m", "resnet18")
    assert (
        "takes in_channels=3 from what flows in; or pass --input-size 1,1,224,224, if that is the input you want"
        in error
    )
    assert "--input-size" not in refused(cli, folder, "replace", "fc", "Linear(7,10)", "-m", "resnet18")


def test_a_note_says_that_a_replaced_module_is_never_called(cli: Cli) -> None:
    told = " ".join(cli("replace", "aux*.fc2", "Linear(_,10)", "-m", "googlenet").err.split())
    assert "aux1.fc2, aux2.fc2 did not run in the forward pass, so the check does not cover them" in told
    assert "did not run" not in cli("replace", "fc", "Linear(_,10)", "-m", "googlenet").err


def test_a_container_counts_as_called_if_its_children_are(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.blocks = nn.ModuleList([nn.Linear(4, 4)])\n    def forward(self, x):\n"
        "        for block in self.blocks:\n            x = block(x)\n        return x\n"
    )
    words = ("-m", "own.py:Net", "--input-size", "1,4")
    assert "did not run" not in cli("replace", "blocks", "ModuleList([Linear(4,4),ReLU()])", *words).err


def test_an_error_includes_the_notes_of_earlier_edits(cli: Cli) -> None:
    words = ("replace", "layer2.0.conv1", "Conv2d(_,_,_)", "-m", "resnet18")
    told = " ".join(cli(*words, code=2).err.split())
    assert "note: layer2.0.conv1" in told
    assert "stride" in told.partition("error:")[0]
    assert json.loads(cli(*words, "--json", code=2).err)["error"]["notes"]
    assert "note:" not in cli(*words, "-q", code=2).err


def test_notes_of_a_recipe_are_shown_once(cli: Cli, folder: Path) -> None:
    cli("load", "resnet18")
    assert "running mean" in cli("freeze", "layer1").err
    assert "running mean" not in cli("replace", "fc", "Linear(_,10)").err


@pytest.mark.parametrize("check", ["meta", "run"])
def test_stated_inputs_get_the_new_dtype_after_a_cast(cli: Cli, folder: Path, check: str) -> None:
    (folder / "two.py").write_text(
        "from torch import nn\n\nclass Two(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.tok = nn.Embedding(5, 4)\n        self.img = nn.Conv2d(3, 4, 8)\n"
        "    def forward(self, words, image):\n        return self.tok(words).sum(1) + self.img(image).flatten(1)\n"
    )
    words = ("-m", "two.py:Two", "--input-size", "2,5", "--input-size", "2,3,8,8")
    words += ("--input-dtype", "int64", "--input-dtype", "float32", "--check", check)
    assert cli("cast", ".", "bf16", *words, "-o", "out.pth", "--json").json["check"]["ran"]
    assert cli("freeze", "tok", "-m", "out.pth", "--trust", "--json").json["check"]["ran"]
    error = cli("cast", "img", "bf16", *words, code=2).err
    assert "you stated float32 as the dtype of the input" in error


def test_the_error_for_an_unwritable_recipe_names_the_written_file(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise SystemFailureError("modelcli.toml: full")

    cli("load", "resnet18")
    before = (folder / "modelcli.toml").read_bytes()
    monkeypatch.setattr(recipe, "append", fails)
    error = " ".join(cli("freeze", "layer1", "-o", "out.pth", code=5).err.split())
    assert "modelcli.toml: full; out.pth was written, but the recipe is unchanged" in error
    assert (folder / "modelcli.toml").read_bytes() == before


def test_extract_finds_the_input_of_a_module_called_with_default_keywords(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(
        "from torch import nn\n\nclass Part(nn.Linear):\n    def forward(self, x, mask=None, scale=1):\n"
        "        return super().forward(x) * scale\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.part = Part(4, 2)\n"
        "    def forward(self, x):\n        return self.part(x, mask=None, scale=1)\n"
    )
    check = cli("extract", "part", "-m", "own.py:Net", "--input-size", "1,4", "--json").json["check"]
    assert (check["ran"], check["output_shape"]) == (True, [1, 2])


_PARTS = """
import dataclasses
import torch
from torch import nn

@dataclasses.dataclass
class State:
    x: torch.Tensor

class Part(nn.Linear):
    def forward(self, x, *, pair, mask=None, cache=None, scale=1, **further):
        return super().forward(x * scale + pair[0] + pair[1]["more"]) if mask is None else super().forward(x)

class Needy(nn.Linear):
    def forward(self, x, state):
        return super().forward(x + state.x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.needy = Part(4, 4), Needy(4, 2)
    def forward(self, x):
        x = self.part(x, pair=(x[0], {"more": x}), mask=x > 0, cache=State(x), scale=2, word="a", nothing=None)
        return self.needy(x, state=State(x))
"""


def test_extract_states_the_inputs_of_a_part_by_position_and_name(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(_PARTS)
    done = cli("extract", "part", "-m", "own.py:Net", "--input-size", "1,4", "-o", "out.pth")
    assert "part was given cache (State), which no input can state: it runs without" in done.err
    assert cli("summary", "out.pth", "--trust", "--json").json["layers"][0]["output_shape"] == [1, 4]
    record = checkpoints.read(folder / "out.pth").record
    assert record is not None
    assert (record.input_size, record.inputs) == (
        ((1, 4),),
        ("pair.0=4", "pair.1.more=1,4", "mask=1,4:bool", "scale==2", "word=='a'"),
    )
    load = cli("cast", ".", "bfloat16", "-m", "out.pth", "--trust", "--json").json["check"]
    assert load["ran"]


def test_extract_says_what_of_the_inputs_of_a_part_cannot_be_stated(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(_PARTS)
    document = cli("extract", "needy", "-m", "own.py:Net", "--input-size", "1,4", "--json").json
    assert not document["check"]["ran"]
    note = "what flows into needy is not known: no input can state state, which is a State"
    assert note in document["notes"]


def test_the_hint_shows_the_edit_with_the_fitting_value(cli: Cli, folder: Path) -> None:
    error = refused(cli, folder, "replace", "classifier.5", "Softmax(4)", "-m", "alexnet")
    assert "hint: replace classifier.5 'Softmax(dim=-1)'" in error


GREY = ("-m", "resnet18", "--input-size", "1,1,224,224")


@pytest.mark.parametrize("check", ["meta", "run"])
def test_a_stated_input_that_the_unedited_model_rejects_excuses_no_failure(cli: Cli, folder: Path, check: str) -> None:
    """resnet18 is known to run on 1,3,224,224. That it rejects the stated input does not excuse another failure."""
    error = refused(cli, folder, "replace", "conv1", "Conv2d(1,32,7,2,3,bias=False)", *GREY, "--check", check)
    assert "bn1 BatchNorm2d(64) does not fit: [1,32,112,112] float32 flows in (from conv1" in error
    assert "before the edit the model does not take the stated input either (1,1,224,224)" in error


def test_a_stated_input_that_the_edited_model_takes(cli: Cli) -> None:
    words = ("replace", "conv1", "Conv2d(1,64,7,2,3,bias=False)", *GREY, "--json")
    assert cli(*words).json["check"]["output_shape"] == [1, 1000]


def test_a_stated_input_that_fits_neither_model(cli: Cli, folder: Path) -> None:
    """The input has channels last. The unedited model runs on another input, so the check would be possible."""
    words = ("replace", "fc", "Linear(_,3)", "-m", "resnet18", "--input-size", "1,224,224,3")
    error = refused(cli, folder, *words)
    assert "before the edit the model does not take the stated input either (1,224,224,3)" in error
    assert "remove --input-size and --input-dtype" in " ".join(error.split())
    cli("replace", "fc", "Linear(_,3)", "-m", "resnet18", "--dry-run")


@pytest.mark.parametrize("check", ["meta", "run"])
def test_another_failure_than_the_unedited_models_is_refused(cli: Cli, folder: Path, check: str) -> None:
    """The input of a Sequential is unknown, so a failure of the unedited model excuses only the same failure."""
    words = ("-m", "Sequential(Linear(4,3),Linear(3,3),Linear(5,2))", "--input-size", "1,4", "--check", check)
    error = refused(cli, folder, "replace", "0", "Linear(4,7)", *words)
    assert "1 Linear(3, 3) does not fit: [1,7] float32 flows in" in error
    assert "before the edit the forward pass ended in 2: [1,3] float32 flows in, it expects [*,5]" in error
    check_of = cli("freeze", "0", *words, "--json").json["check"]
    assert check_of["reason"].startswith("the model cannot run before the edit either: the forward pass ended in 2")


def test_a_failure_that_an_edit_has_moved_is_the_same(cli: Cli) -> None:
    words = ("-m", "Sequential(Linear(4,3),Linear(5,2))", "--input-size", "1,4", "--json")
    assert cli("insert", "0", "Identity()", *words).json["check"]["ran"] is False


def test_new_code_that_needs_values_is_not_an_error(cli: Cli, folder: Path) -> None:
    words = ("replace", "1", "nets.py:Deciding()", "-m", "Sequential(Linear(4,4),ReLU())", "--input-size", "1,4")
    check = cli(*words, "--json").json["check"]
    assert (check["ran"], "--check run makes the pass with values" in check["reason"]) == (False, True)
    assert cli(*words, "--check", "run", "--json").json["check"]["output_shape"] == [1, 4]


def test_another_input_is_offered_only_where_it_works(cli: Cli, folder: Path) -> None:
    error = refused(cli, folder, "replace", "conv1", "Conv2d(1,32,7,2,3,bias=False)", "-m", "resnet18")
    assert "takes in_channels=3 from what flows in" in error
    assert "--input-size" not in error


BY_HAND = """
import torch
from torch import nn
from torch.nn import functional as F

class Mm(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 3))
    def forward(self, x):
        return torch.mm(torch.mm(x, self.w), self.v)

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))
    def forward(self, x):
        return F.linear(x, self.w, self.v)

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.register_buffer("v", torch.zeros(4))
        self.register_buffer("u", torch.ones(4))
    def forward(self, x):
        return F.batch_norm(x, self.v, self.u, self.w)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.pos, self.head = nn.Embedding(10, 8), nn.Embedding(6, 8), nn.Linear(8, 3)
    def forward(self, x):
        return self.head(self.tok(x) + self.pos(torch.arange(x.shape[1], device=x.device)))
"""


@pytest.mark.parametrize(
    ("target", "model", "message"),
    [
        ("fc.bias", ("resnet18",), "fc Linear cannot run after the edit: PyTorch does not run addmm"),
        ("**:LayerNorm2d", ("convnext_tiny",), "features.0.1 LayerNorm2d cannot run after the edit"),
        ("**.running_*", ("resnet18",), "bn1 BatchNorm2d cannot run after the edit"),
        ("v", ("own.py:Mm", "--input-size", "2,4"), "PyTorch does not run mm on [2,4] float32, [4,3] bfloat16"),
        ("v", ("own.py:Line", "--input-size", "2,4"), "PyTorch does not run addmm on [3] bfloat16"),
        ("v", ("own.py:Norm", "--input-size", "2,4,5"), "PyTorch does not run native_batch_norm"),
    ],
)
def test_a_dtype_that_does_not_fit_an_operator(
    cli: Cli, folder: Path, target: str, model: tuple[str, ...], message: str
) -> None:
    (folder / "own.py").write_text(BY_HAND)
    error = refused(cli, folder, "cast", target, "bfloat16", "-m", *model)
    assert message in error
    assert "hint: cast . bfloat16 casts the whole model" in error
    cli("cast", ".", "bfloat16", "-m", *model, "-o", "out.pth")


def test_an_empty_batch_runs_in_any_dtype(cli: Cli, folder: Path) -> None:
    """For an empty batch, the CPU does not compare dtypes."""
    words = ("-m", "Sequential(BatchNorm2d(3),ReLU())", "--input-size", "0,3,8,8", "--input-dtype", "float32")
    assert nn.BatchNorm2d(3, dtype=torch.bfloat16).eval()(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)
    assert cli("replace", "0", "BatchNorm2d(3,dtype=torch.bfloat16)", *words, "--json").json["check"]["ran"]


def test_a_note_says_that_the_range_of_indices_is_not_checked(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(BY_HAND)
    words = ("-m", "own.py:Words", "--input-size", "1,6", "--input-dtype", "int64")
    told = " ".join(cli("replace", "pos", "Embedding(4,_)", *words).err.split())
    assert "note: pos.weight has 4 rows, and the check has no index values" in told
    error = refused(cli, folder, "replace", "pos", "Embedding(4,_)", *words, "--check", "run")
    assert "pos Embedding cannot run after the edit: index out of range" in error
    assert "rows" not in cli("replace", "head", "Linear(_,5)", *words).err


def test_an_operator_without_a_cpu_kernel_is_not_an_error(cli: Cli, folder: Path) -> None:
    """A GPU may have the kernel, so the check passes with a note on what it could not run."""
    (folder / "own.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Far(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.w = nn.Parameter(torch.ones(3, 4))\n"
        "    def forward(self, x):\n        return torch.cdist(x, self.w)\n"
    )
    told = cli("cast", ".", "bfloat16", "-m", "own.py:Far", "--input-size", "2,4").err
    assert "for bfloat16 on the CPU, so the check skipped it" in " ".join(told.split())


@pytest.mark.parametrize(
    ("model", "words", "reason"),
    [
        ("Sequential(Conv2d(3,8,3),ConvTranspose2d(4,2,2))", ("1,3,8,8",), "[1,8,6,6] float32 flows in, it expects 4"),
        ("Linear(4,2)", ("1,4", "--input-dtype", "bfloat16"), "[1,4] bfloat16 flows in, it expects float32"),
        ("Softmax(4)", ("1,4",), "an axis 4, but there are"),
    ],
)
def test_the_rules_hold_for_every_pass(cli: Cli, model: str, words: tuple[str, ...], reason: str) -> None:
    """A pass that only the meta device accepts does not count as having run, in a summary and for an output shape."""
    assert reason in " ".join(cli("summary", model, "--input-size", *words).out.split())
    shape = "1,2,7,7" if "Conv" in model else "1,2"
    code = main(["check", model, "--input-size", *words, "--output-shape", shape])
    told = cli.capsys.readouterr()
    assert code in (1, 2)
    assert reason in " ".join((told.out + told.err).split())


def test_the_fix_inside_a_new_module_is_a_valid_command(cli: Cli, folder: Path) -> None:
    """The unedited model has no fc.2, so the hint changes fc.2 inside the new module."""
    new = "Sequential(Linear(_,256),ReLU(),{})"
    error = refused(cli, folder, "replace", "fc", new.format("Linear(7,10)"), "-m", "resnet18")
    assert "fc.2 Linear(7, 10) does not fit: [1,256] float32" in error
    assert "replace fc.2" not in error
    mended = re.search(r"hint: write (\S+) instead of Linear\(7, 10\) inside the new module at fc\n", error)
    assert mended is not None
    cli("replace", "fc", new.format(mended[1]), "-m", "resnet18", "--dry-run")


def test_the_hint_for_selectors_joined_by_commas(cli: Cli, folder: Path) -> None:
    error = cli("replace", "relu,maxpool", "Identity()", "-m", "resnet18", code=2).err
    assert "hint: write '{relu,maxpool}', in quotes" in error
    cli("replace", "{relu,maxpool}", "Identity()", "-m", "resnet18", "--dry-run", "--check", "none")
