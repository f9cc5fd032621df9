"""graft: compared with `load_state_dict` of plain PyTorch, for every kind of model and every kind of source."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from itertools import product
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import modelcli
from modelcli.edits.graft.source_part import Part
from modelcli.errors import ModelcliError, RequestError
from modelcli.live.surgery import seed_of
from tests.commands.test_script import both
from tests.conftest import Cli
from tests.live.surgery.state_files import read, write
from tests.sampling import sampled

State = dict[str, torch.Tensor]

OWN = """
import torch
from torch import nn


class Part(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


class Whole(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = Part(width)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x))


class Untied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
"""
EXPRESSION = "Sequential(Conv2d(3,4,1),BatchNorm2d(4),Linear(4,3))"


@pytest.fixture(autouse=True)
def own(folder: Path) -> None:
    Path("own.py").write_text(OWN)


def made(text: str, seed: int = 0) -> nn.Module:
    """Return what a class of `own.py` makes after `torch.manual_seed`."""
    names: dict[str, object] = {}
    exec(OWN, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = eval(text, names)
    assert isinstance(module, nn.Module)
    return module


def changed(module: nn.Module) -> nn.Module:
    """Give every tensor other values, so that no buffer is as its class makes it."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(torch.ones((), dtype=tensor.dtype))
    return module


def plain(module: nn.Module) -> State:
    return dict(module.state_dict())


def assert_equal(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


# --- every kind of model and source ---------------------------------------------------------------------------------


def training(state: State, name: str) -> str:
    torch.save({"state_dict": state, "epoch": 3}, name)
    return name


def as_file(ending: str) -> Callable[[State, str], str]:
    def write_one(state: State, stem: str) -> str:
        name = f"{stem}{ending}"
        write(state, name) if ending in (".pth", ".safetensors") else shards(state, name)
        return name

    return write_one


def shards(state: State, name: str) -> None:
    """Write a folder with an index and two shards."""
    write(state, "a")
    Path("a").rename(name)


FILES: dict[str, Callable[[State, str], str]] = {
    "bare": as_file(".pth"),
    "training": lambda state, stem: training(state, f"{stem}.ckpt"),
    "safetensors": as_file(".safetensors"),
    "shards": as_file(""),
}
MODELS = ("class", "class with weights", "modelcli file", "modelcli safetensors", *FILES, "bare with --arch")
SOURCES = ("class", "class with weights", "modelcli file", *FILES)


def model_words(cli: Cli, kind: str) -> tuple[list[str], State]:
    """Return the options that name a model of a kind, and its state dict."""
    state = plain(changed(made("Whole()", 0)))
    if kind == "class":
        return ["-m", "own.py:Whole()"], plain(made("Whole()", 0))
    if kind == "class with weights":
        return ["-m", "own.py:Whole()", "--weights", FILES["bare"](state, "model")], state
    if kind.startswith("modelcli"):
        out = "model.safetensors" if kind.endswith("safetensors") else "model.pth"
        cli("save", out, "-m", "own.py:Whole()", "--weights", FILES["bare"](state, "values"))
        return ["-m", out, "--trust"], state
    name = FILES["bare" if kind == "bare with --arch" else kind](state, "model")
    return ["-m", name, *(["--arch", "own.py:Whole()"] if "--arch" in kind else [])], state


def source_words(cli: Cli, kind: str) -> tuple[str, list[str], State]:
    """Return the reference of a source, the options for it, and its state dict."""
    state = plain(changed(changed(made("Whole()", 5))))
    if kind == "class":
        return "own.py:Whole()", [], plain(made("Whole()", seed_of(0, 1)))
    if kind == "class with weights":
        return "own.py:Whole()", ["--source-weights", FILES["bare"](state, "source")], state
    if kind == "modelcli file":
        cli("save", "source.pth", "-m", "own.py:Whole()", "--weights", FILES["bare"](state, "kept"))
        return "source.pth", [], state
    return FILES[kind](state, "source"), [], state


@pytest.mark.parametrize("kinds", sampled([*product(MODELS, SOURCES)], 5), ids=str)
def test_every_kind_of_model_from_every_kind_of_source(cli: Cli, kinds: tuple[str, str]) -> None:
    words, before = model_words(cli, kinds[0])
    source, options, other = source_words(cli, kinds[1])
    expected = before | {name: other[name] for name in other if name.startswith("body.")}
    cli("graft", "body", f"{source}:body", *options, *words, "-o", "out.pth")
    found = torch.load("out.pth", weights_only=True)
    found = found["state_dict"] if "epoch" in found else found
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    # The index of shards lists the keys in another order than the files, which a script reads.
    suffix = "safetensors" if kinds[0] == "shards" else "pth"
    both(cli, *words, "-e", " ".join(["graft", "body", f"{source}:body", *options]), suffix=suffix)


def test_flags_and_ties_of_the_model_stay() -> None:
    model = made("Tied()")
    model.one.weight.requires_grad_(False)
    other = changed(made("Tied()", 4))
    torch.save(other.state_dict(), "other.pth")
    weight = model.one.weight
    modelcli.apply(model, "graft . other.pth")
    assert model.one.weight is weight
    assert model.two.weight is weight
    assert not weight.requires_grad
    assert model.two.bias.requires_grad
    assert_equal(plain(model), plain(other))


def test_a_live_model_gets_what_load_state_dict_gives_it() -> None:
    model, again = made("Whole()"), made("Whole()")
    other = changed(made("Part()", 3))
    torch.save(other.state_dict(), "other.pth")
    again.body.load_state_dict(torch.load("other.pth", weights_only=True))
    assert modelcli.apply(model, "graft body other.pth") is model
    assert_equal(plain(model), plain(again))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("keys", [False, True])
def test_values_are_converted_to_the_dtype_of_the_model(cli: Cli, dtype: torch.dtype, keys: bool) -> None:
    model = made("Whole()").to(torch.bfloat16)
    torch.save(dict(model.state_dict()), "model.pth")
    other = {name: (value * 3).to(dtype) for name, value in made("Part()", 3).state_dict().items()}
    other["bn.num_batches_tracked"] = torch.tensor(9)
    torch.save(other, "other.pth")
    words = ["-m", "model.pth", *([] if keys else ["--arch", "own.py:Whole()"])]
    if keys and not dtype.is_floating_point:
        error = cli("graft", "body", "other.pth", *words, "--json", code=2).error
        assert "conv.weight is int32 in the source and bfloat16 here" in error["message"]
        return
    model.body.load_state_dict(other)
    result = cli("graft", "body", "other.pth", *words, "-o", "out.pth")
    assert ("are converted" in result.err) == (dtype != torch.bfloat16)
    assert_equal(dict(torch.load("out.pth", weights_only=True)), plain(model))
    both(cli, *words, "-e", "graft body other.pth")


def test_a_wider_value_that_does_not_fit_is_reported_as_for_a_cast(cli: Cli) -> None:
    torch.save({"w": torch.zeros(2, dtype=torch.float16)}, "model.pth")
    torch.save({"w": torch.tensor([1.0, 1e9])}, "other.pth")
    assert "float16" in cli("graft", ".", "other.pth", "-m", "model.pth", "-o", "out.pth").err
    assert torch.load("out.pth", weights_only=True)["w"].isinf().any()


def test_a_channels_last_model_keeps_its_strides() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)
    other = nn.Sequential(nn.Conv2d(3, 4, 2))
    torch.save(other.state_dict(), "other.pth")
    modelcli.apply(model, "graft . other.pth")
    assert torch.equal(model[0].weight, other[0].weight)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_part_of_a_large_storage_does_not_take_all_of_it_along(cli: Cli) -> None:
    torch.save({"w": torch.zeros(4)}, "model.pth")
    torch.save({"w": torch.arange(100_000.0)[7:11]}, "other.pth")
    for words in ([], ["--arch", "own.py:Holder()"]):
        with Path("own.py").open("a") as file:
            file.write("\n\nclass Holder(nn.Module):\n    def __init__(self):\n        super().__init__()\n")
            file.write("        self.w = nn.Parameter(torch.zeros(4))\n")
        cli("graft", ".", "other.pth", "-m", "model.pth", *words, "-o", "out.pth", "--check", "none", "--force")
        found = torch.load("out.pth", weights_only=True)["w"]
        assert found.tolist() == [7.0, 8.0, 9.0, 10.0]
        assert found.untyped_storage().nbytes() == 16


def test_what_comes_from_the_file_of_the_model_itself_is_a_copy(cli: Cli) -> None:
    state = {"a.w": torch.arange(3.0), "b.w": torch.zeros(3)}
    torch.save(state, "model.pth")
    cli("graft", "b", "model.pth:a", "-m", "model.pth", "-o", "out.pth")
    found = torch.load("out.pth", weights_only=True)
    assert torch.equal(found["b.w"], state["a.w"])
    assert found["a.w"].data_ptr() != found["b.w"].data_ptr()
    both(cli, "-m", "model.pth", "-e", "graft b model.pth:a")


def test_one_tensor_of_the_source_under_two_names_becomes_two(cli: Cli) -> None:
    save = made("Tied()", 2)
    torch.save(save.state_dict(), "tied.pth")
    for words in (["-m", "own.py:Untied()"], ["-m", "untied.pth"]):
        torch.save(made("Untied()").state_dict(), "untied.pth")
        cli("graft", ".", "tied.pth", *words, "-o", "out.pth", "--check", "none", "--force")
        found = torch.load("out.pth", weights_only=True)
        assert torch.equal(found["one.weight"], save.one.weight)
        assert found["one.weight"].data_ptr() != found["two.weight"].data_ptr()


@pytest.mark.parametrize("keys", [False, True])
def test_names_of_one_tensor_need_one_value(cli: Cli, keys: bool) -> None:
    torch.save(made("Tied()").state_dict(), "tied.pth")
    words = ["-m", "tied.pth"] if keys else ["-m", "own.py:Tied()"]
    torch.save(made("Untied()", 2).state_dict(), "other.pth")
    error = cli("graft", ".", "other.pth", *words, "--json", code=2).error
    assert "one.weight and two.weight are one tensor here" in error["message"]
    assert error["hint"].startswith("untie ")
    equal = made("Untied()", 2).state_dict()
    equal["two.weight"] = equal["one.weight"].clone()
    torch.save(equal, "equal.pth")
    cli("graft", ".", "equal.pth", *words, "-o", "out.pth", "--check", "none")
    found = torch.load("out.pth", weights_only=True)
    assert torch.equal(found["one.weight"], equal["one.weight"])
    assert found["one.weight"].data_ptr() == found["two.weight"].data_ptr()
    torch.save({"one.weight": equal["one.weight"], "two.bias": equal["two.bias"]}, "first.pth")
    cli("graft", ".", "first.pth", *words, "-o", "again.pth", "--check", "none")
    assert torch.equal(torch.load("again.pth", weights_only=True)["two.weight"], equal["one.weight"])
    both(cli, *words, "-e", "graft . first.pth")


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [False, True])
def test_keys_that_do_not_match_are_reported_as_load_reports_them(cli: Cli, keys: bool) -> None:
    torch.save(made("Whole()").state_dict(), "model.pth")
    other = dict(changed(made("Part()", 3)).state_dict())
    other["fc.weight"] = torch.ones(5, 4)
    other["extra.weight"] = torch.ones(1)
    del other["conv.bias"]
    torch.save(other, "other.pth")
    words = ["-m", "model.pth", *([] if keys else ["--arch", "own.py:Whole()"])]
    torch.save({f"body.{name}": value for name, value in other.items()} | plain(made("Whole()")), "as_load.pth")
    report = cli("graft", "body", "other.pth", *words, "--json", code=1)
    wanted = cli("load", "other.pth", "--arch", "own.py:Part()", "--json", code=1)
    for key in ("matched", "missing", "unexpected", "mismatched"):
        assert report.json[key] == wanted.json[key], key
    assert "missing: conv.bias; unexpected: extra.weight" in report.error["message"]
    assert "--no-strict" in report.error["hint"]
    table = cli("graft", "body", "other.pth", *words, code=1)
    assert "conv.bias     missing     -         -" in table.out
    assert "fc.weight     mismatched  [3,4]     [5,4]" in table.out
    result = cli("graft", "body", "other.pth", *words, "--no-strict", "-o", "out.pth")
    for name in ("body.conv.bias stays as before", "body.fc.weight is [5, 4] in the source", "extra.weight of other"):
        assert name in result.err
    expected = plain(made("Whole()"))
    expected |= {f"body.{n}": v for n, v in other.items() if n not in ("fc.weight", "extra.weight")}
    assert_equal(dict(torch.load("out.pth", weights_only=True)), expected)
    both(cli, *words, "-e", "graft body other.pth --no-strict")


def test_prefixes_of_wrappers_are_removed_as_load_removes_them(cli: Cli) -> None:
    other = plain(changed(made("Whole()", 3)))
    torch.save({f"module.{name}": value for name, value in other.items()}, "parallel.pth")
    torch.save(plain(made("Whole()")), "model.pth")
    for words in (["-m", "own.py:Whole()"], ["-m", "model.pth"]):
        result = cli("graft", ".", "parallel.pth", *words, "-o", "out.pth", "--force")
        assert "stripped 'module.' from every key" in result.err
        assert_equal(dict(torch.load("out.pth", weights_only=True)), other)
        both(cli, *words, "-e", "graft . parallel.pth")
        result = cli("graft", "body", "parallel.pth:body", *words, "-o", "out.pth", "--force")
        assert "stripped 'module.' from every key" in result.err
        both(cli, *words, "-e", "graft body parallel.pth:body")
        both(cli, *words, "-e", "graft body parallel.pth:module.body")


def test_a_part_is_found_below_names_of_wrappers_that_are_everywhere(cli: Cli) -> None:
    other = plain(changed(made("Part()", 3)))
    torch.save({f"module.backbone.{name}": value for name, value in other.items()}, "parallel.pth")
    for path in ("backbone", "module.backbone"):
        cli("graft", "body", f"parallel.pth:{path}", "-m", "own.py:Whole()", "-o", "out.pth", "--force")
        expected = plain(made("Whole()")) | {f"body.{name}": value for name, value in other.items()}
        assert_equal(dict(torch.load("out.pth", weights_only=True)), expected)
        both(cli, "-m", "own.py:Whole()", "-e", f"graft body parallel.pth:{path}")


def test_rename_changes_the_keys_of_the_source_first(cli: Cli) -> None:
    other = plain(changed(made("Part()", 3)))
    named = {name.replace("conv.", "stem.").replace("bn.", "norm."): value for name, value in other.items()}
    torch.save({f"encoder.{name}": value for name, value in named.items()}, "other.pth")
    torch.save(plain(made("Whole()")), "model.pth")
    lines = ["--rename", "encoder.** **", "--rename", "stem.* conv.*", "--rename", "norm.* bn.*"]
    for words in (["-m", "own.py:Whole()"], ["-m", "model.pth"]):
        cli("graft", "body", "other.pth", *lines, *words, "-o", "out.pth", "--force")
        expected = plain(made("Whole()")) | {f"body.{name}": value for name, value in other.items()}
        assert_equal(dict(torch.load("out.pth", weights_only=True)), expected)
        line = "graft body other.pth --rename 'encoder.** **' --rename 'stem.* conv.*' --rename 'norm.* bn.*'"
        both(cli, *words, "-e", line)
        both(cli, *words, "-e", line.replace("other.pth", "other.pth:encoder").replace("--rename 'encoder.** **'", ""))
    error = cli("graft", "body", "other.pth", "--rename", "nothing.** **", "-m", "model.pth", "--json", code=2).error
    assert "--rename 'nothing.** **' of other.pth" in error["message"]
    error = cli("graft", "body", "other.pth", "--rename", "a", "-m", "model.pth", "--json", code=2).error
    assert "--rename takes an old and a new name, not 'a'" in error["message"]


def test_also_init_draws_what_the_source_lacks(cli: Cli) -> None:
    torch.save(made("Whole()").state_dict(), "model.pth")
    other = {k: v for k, v in changed(made("Part()", 3)).state_dict().items() if not k.startswith(("fc.", "conv.b"))}
    torch.save(other, "other.pth")
    words = ["-m", "model.pth", "--arch", "own.py:Whole()"]
    result = cli("graft", "body", "other.pth", "--also-init", *words, "-o", "out.pth")
    assert "initialised anew: body.conv.bias, body.fc" in result.err
    truth = made("Whole()")
    torch.manual_seed(seed_of(0, 1))
    truth.body.conv.reset_parameters()
    truth.body.fc.reset_parameters()
    truth.body.load_state_dict(other, strict=False)
    assert_equal(dict(torch.load("out.pth", weights_only=True)), plain(truth))
    both(cli, *words, "-e", "graft body other.pth --also-init")
    live = made("Whole()")
    modelcli.apply(live, "graft body other.pth --also-init")
    assert_equal(plain(live), plain(truth))
    other["fc.weight"] = torch.ones(9, 4)
    torch.save(other, "other.pth")
    assert "mismatched" in cli("graft", "body", "other.pth", "--also-init", *words, code=1).out
    cli("graft", "body", "other.pth", "--also-init", "--no-strict", *words, "-o", "again.pth")
    assert_equal(dict(torch.load("again.pth", weights_only=True)), plain(truth))
    error = cli("graft", "body", "other.pth", "--also-init", "-m", "model.pth", "--json", code=2).error
    assert "a plain state dict records no classes" in error["message"]


def test_a_state_dict_without_counts_of_batches_fits_as_torch_lets_it(cli: Cli) -> None:
    other = {k: v for k, v in changed(made("Part()", 3)).state_dict().items() if "num_batches" not in k}
    torch.save(other, "other.pth")
    truth = changed(made("Whole()"))
    torch.save(truth.state_dict(), "model.pth")
    truth.body.load_state_dict(other)
    words = ["-m", "own.py:Whole()", "--weights", "model.pth"]
    cli("graft", "body", "other.pth", *words, "-o", "out.pth")
    assert_equal(dict(torch.load("out.pth", weights_only=True)), plain(truth))
    both(cli, *words, "-e", "graft body other.pth")


def test_a_key_of_a_training_checkpoint_can_be_named(cli: Cli) -> None:
    student, teacher = plain(made("Part()", 1)), plain(made("Part()", 2))
    torch.save({"student": student, "teacher": teacher}, "dino.pth")
    torch.save(plain(made("Whole()")), "model.pth")
    cli("graft", "body", "dino.pth", "--source-key", "teacher", "-m", "model.pth", "-o", "out.pth")
    found = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(found[f"body.{name}"], value) for name, value in teacher.items())
    both(cli, "-m", "model.pth", "-e", "graft body dino.pth --source-key teacher")


# --- what other libraries make ---------------------------------------------------------------------------------------


def dino(resnet: State) -> list[str]:
    """Write a checkpoint as DINO does, with a projection head. Returns the words that take its backbone."""
    own = {f"module.backbone.{name}": value for name, value in resnet.items() if not name.startswith("fc.")}
    head = {"module.head.mlp.0.weight": torch.ones(2, 2)}
    torch.save({"student": head, "teacher": own | head, "epoch": 3}, "dino.pth")
    return ["backbone.body", "dino.pth:backbone", "--source-key", "teacher"]


def assert_backbone(found: State, resnet: State) -> None:
    names = [name for name in resnet if not name.startswith("fc.")]
    for name in names:
        if f"backbone.body.{name}" in found:
            assert torch.equal(found[f"backbone.body.{name}"], resnet[name]), name
        else:
            assert name.endswith("num_batches_tracked")  # a frozen BatchNorm has none


def test_a_backbone_of_dino_goes_into_a_detector(cli: Cli) -> None:
    torch.manual_seed(2)
    resnet = plain(torchvision.models.resnet18())
    with Path("own.py").open("a") as file:
        file.write(
            "\n\ndef detector():\n"
            "    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone as make\n"
            "    from torchvision.models.detection import FasterRCNN\n"
            "    return FasterRCNN(make(backbone_name='resnet18', weights=None), 3, min_size=64, max_size=64)\n"
        )
    words = [*dino(resnet), "-m", "own.py:detector()", "-o", "out.pth", "--check", "none"]
    cli("graft", *words)
    found = torch.load("out.pth", weights_only=True)
    assert_backbone(found, resnet)
    names: dict[str, Callable[[], nn.Module]] = {}
    exec(Path("own.py").read_text(), names)
    truth = names["detector"]()
    truth.backbone.body.load_state_dict({k: v for k, v in resnet.items() if not k.startswith("fc.")}, strict=False)
    for name, value in truth.backbone.body.state_dict().items():
        assert torch.equal(found[f"backbone.body.{name}"], value), name


@pytest.mark.sweep
def test_a_backbone_of_dino_goes_into_a_detector_of_torchvision(cli: Cli) -> None:
    torch.manual_seed(2)
    resnet = plain(torchvision.models.resnet50())
    words = ["graft", *dino(resnet), "-m", "fasterrcnn_resnet50_fpn"]
    cli(*words, "-o", "out.pth", "--check", "none")
    assert_backbone(torch.load("out.pth", weights_only=True), resnet)
    cli("graft", "backbone.body", "resnet50", "-m", "fasterrcnn_resnet50_fpn", "--no-strict", "-o", "drawn.pth")
    torch.manual_seed(seed_of(0, 1))
    assert_backbone(torch.load("drawn.pth", weights_only=True), plain(torchvision.models.resnet50()))


def test_a_vit_of_timm_takes_a_file_and_gives_its_own(cli: Cli) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(4)
    vit = timm.create_model("test_vit")
    torch.save(dict(vit.state_dict()), "vit.pth")
    cli("graft", "blocks", "vit.pth:blocks", "-m", "timm:test_vit", "-o", "out.pth")
    found = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(found[name], v) for name, v in vit.state_dict().items() if name.startswith("blocks."))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(0, 1))
        drawn = timm.create_model("test_vit").state_dict()
    result = cli("graft", "blocks.0", "timm:test_vit:blocks.0", "-m", "vit.pth", "-o", "again.pth")
    assert "timm:test_vit was randomly initialised" in result.err
    found = torch.load("again.pth", weights_only=True)
    assert all(torch.equal(found[name], v) for name, v in drawn.items() if name.startswith("blocks.0."))


@pytest.mark.sweep
def test_scripts_read_models_of_timm(cli: Cli) -> None:
    timm = pytest.importorskip("timm")
    torch.save(dict(timm.create_model("test_vit").state_dict()), "vit.pth")
    both(cli, "-m", "timm:test_vit", "-e", "graft blocks vit.pth:blocks")
    both(cli, "-m", "vit.pth", "-e", "graft blocks.0 timm:test_vit:blocks.0")
    both(cli, "-m", "timm:test_vit", "-e", "graft . timm:test_vit --source-weights vit.pth")


def test_a_folder_of_hugging_face_is_a_source_and_a_model(cli: Cli) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(6)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=12, **sizes)
    bert = transformers.BertModel(config)
    bert.save_pretrained("bert")
    for words in (["-m", "hf:./bert"], ["-m", "bert.pth"]):
        torch.manual_seed(7)
        torch.save(dict(transformers.BertModel(config).state_dict()), "bert.pth")
        for source in ("bert/:encoder.layer", "bert:encoder.layer", "hf:./bert:encoder.layer"):
            cli("graft", "encoder.layer", source, *words, "-o", "out.pth", "--force")
            found = torch.load("out.pth", weights_only=True)
            for name, value in bert.encoder.layer.state_dict().items():
                assert torch.equal(found[f"encoder.layer.{name}"], value), name
        both(cli, *words, "-e", "graft encoder.layer bert/:encoder.layer")
    cli("graft", "encoder.layer.0", "bert.pth:encoder.layer.1", "-m", "bert", "-o", "edited/")
    again = transformers.BertModel.from_pretrained("edited")
    other = torch.load("bert.pth", weights_only=True)
    for name, value in again.encoder.layer[0].state_dict().items():
        assert torch.equal(value, other[f"encoder.layer.1.{name}"])


# --- files, recipes, records -----------------------------------------------------------------------------------------


def test_the_written_file_needs_neither_the_source_nor_the_class_of_it(cli: Cli) -> None:
    Path("far.py").write_text("from own import Part\n\n\ndef part():\n    return Part()\n")
    other = plain(changed(made("Part()", 3)))
    torch.save(other, "other.pth")
    cli("graft", "0", "other.pth:conv", "-m", EXPRESSION, "-o", "out.pth")
    cli("graft", "1", "far.py:part():bn", "-m", "out.pth", "-o", "again.pth")
    Path("other.pth").unlink()
    Path("far.py").unlink()
    Path("own.py").unlink()
    away = Path("away")
    away.mkdir()
    shutil.move("again.pth", away)
    model = modelcli.load(away / "again.pth")
    assert torch.equal(model[0].weight, other["conv.weight"])
    for words in (["summary"], ["params"], ["check", "--finite"], ["script", "-o", "x.pth", "-m"], ["load"]):
        cli(*words, away / "again.pth")
    cli("freeze", "0", "-m", away / "again.pth", "-o", "frozen.pth", "--check", "run")
    cli("summary", away / "again.pth", "--input-size", "1,3,4,4")


def test_a_recipe_names_the_source_as_seen_from_its_folder(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    other = plain(changed(made("Part()", 3)))
    torch.save(other, "other.pth")
    Path("work").mkdir()
    cli("load", EXPRESSION, "--recipe", "work/recipe.toml")
    cli("graft", "0", "other.pth:conv", "--recipe", "work/recipe.toml")
    cli("graft", "2", "own.py:Part():fc", "--source-weights", "other.pth", "--recipe", "work/recipe.toml")
    text = Path("work/recipe.toml").read_text()
    assert '"graft 0 ../other.pth:conv"' in text
    assert '"graft 2 ../own.py:Part():fc --source-weights ../other.pth"' in text
    cli("save", "one.pth", "--recipe", "work/recipe.toml")
    cli("apply", "work/recipe.toml", "-m", EXPRESSION, "-o", "two.pth", "-e", "graft 0 other.pth:conv")
    monkeypatch.chdir("work")
    cli("save", "three.pth", "--recipe", "recipe.toml")
    cli("script", "--recipe", "recipe.toml", "-o", "four.pth")
    for file in ("../one.pth", "../two.pth", "three.pth"):
        state = torch.load(file, weights_only=True)
        assert torch.equal(state["0.weight"], other["conv.weight"])
        assert torch.equal(state["2.bias"], other["fc.bias"])
    both(cli, "-m", EXPRESSION, "-e", "graft 0 ../other.pth:conv")
    cli("undo", "--recipe", "recipe.toml")
    assert "own.py" not in Path("recipe.toml").read_text()


def test_a_recipe_with_python_in_a_source_is_told_of_as_one_with_python_in_its_model(cli: Cli) -> None:
    Path("theirs.toml").write_text(f'model = "{EXPRESSION}"\nedits = ["graft 2 own.py:Part():fc"]\n')
    result = cli("apply", "theirs.toml", "-o", "out.pth")
    assert "theirs.toml names Python code, which runs with your rights" in result.err
    assert "own.py:Part()" in result.err


def test_a_recipe_that_is_the_architecture_opens_no_source(cli: Cli) -> None:
    Path("r.toml").write_text(f'model = "{EXPRESSION}"\nedits = ["graft 0 gone.pth", "replace 2 Linear(4,7)"]\n')
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 7))
    torch.save(module.state_dict(), "trained.pth")
    cli("load", "trained.pth", "--arch", "r.toml")


def test_a_record_opens_no_other_file(cli: Cli) -> None:
    """A line in a record is data of the file: neither is its source read nor does its code run."""
    Path("evil.py").write_text("from pathlib import Path\n\nPath('ran').touch()\n")
    torch.save(plain(made("Part()", 3)), "other.pth")
    cli("graft", "0", "other.pth:conv", "-m", EXPRESSION, "-o", "out.safetensors")
    name = "out.safetensors"
    data = Path(name).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    (key,) = (key for key, text in header["__metadata__"].items() if "graft 0 other.pth:conv" in text)
    for source in ("evil.py:Net():x", "//192.0.2.1/share/x.pth", "gone.pth:conv"):
        meta = {**header["__metadata__"]}
        meta[key] = meta[key].replace("other.pth:conv", source)
        save_file(load_file(name), "evil.safetensors", metadata=meta)
        assert source in Path("evil.safetensors").read_bytes().decode("latin1")
        for words in (["summary"], ["load"], ["script", "-o", "x.pth", "-m"], ["check", "--finite"]):
            cli(*words, "evil.safetensors")
        modelcli.load("evil.safetensors")
        modelcli.load("evil.safetensors", trust=True)
        Path("modelcli.toml").unlink(missing_ok=True)
    assert not Path("ran").exists()


def test_a_source_that_would_run_code_of_a_file_is_never_built(cli: Cli) -> None:
    """The tensors of a checkpoint need no class, so its record is not followed."""
    cli("save", "own.pth", "-m", "own.py:Part()")
    Path("own.py").write_text("raise SystemExit(9)\n")
    cli("graft", "2", "own.pth:fc", "-m", EXPRESSION, "-o", "out.pth")


def test_keys_alone_need_no_torch(cli: Cli) -> None:
    torch.save({"a.w": torch.ones(3), "b.w": torch.zeros(3)}, "model.pth")
    save_file({"w": torch.full((3,), 2.0)}, "other.safetensors")
    code = (
        "import sys; from modelcli.cli import main; "
        "code = main(['graft', 'b', 'other.safetensors', '-m', 'model.pth', '-o', 'out.pth']); "
        "print(code, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 False"
    assert read("out.pth")["b.w"].tolist() == [2.0, 2.0, 2.0]


def test_the_output_may_replace_the_source_only_with_force(cli: Cli) -> None:
    torch.save({"w": torch.zeros(3)}, "model.pth")
    torch.save({"w": torch.ones(3)}, "other.pth")
    cli("graft", ".", "other.pth", "-m", "model.pth", "-o", "other.pth", code=2)
    cli("graft", ".", "other.pth", "-m", "model.pth", "-o", "other.pth", "--force")
    assert read("other.pth")["w"].tolist() == [1.0, 1.0, 1.0]


def test_a_dry_run_and_a_preview_write_nothing(cli: Cli) -> None:
    torch.save({"w": torch.zeros(3)}, "model.pth")
    torch.save({"w": torch.ones(3)}, "other.pth")
    before = sorted(Path().iterdir())
    cli("graft", ".", "other.pth", "-m", "model.pth")
    cli("graft", ".", "other.pth", "-m", "model.pth", "-o", "out.pth", "--dry-run")
    assert sorted(Path().iterdir()) == before


def test_large_sources_are_read_in_pieces(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of a source stay on disk until they are written: opening and matching reads none of them."""
    from modelcli.checkpoints.storage import Span

    torch.save({"w": torch.zeros(3)}, "model.pth")
    torch.save({"w": torch.ones(3)}, "other.pth")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("values were read")

    for name in ("chunks", "bytes", "mapped", "read_into"):
        monkeypatch.setattr(Span, name, refuse)
    cli("graft", ".", "other.pth", "-m", "model.pth")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["body", "nothing.pth"], 2, "no such file: nothing.pth", None),
        (["body", "nothing.pth:body"], 2, "no such file: nothing.pth", None),
        (["body", "empty/"], 2, "empty is a folder without an index of shards", None),
        (["body", "text.pth"], 4, "text.pth", None),
        (["body", "other.pth:nothing"], 2, "other.pth has no part 'nothing'", "modelcli params other.pth"),
        (["body", "other.pth:conv.weight"], 2, "other.pth has no part 'conv.weight'", "modelcli params other.pth"),
        (["body", "own.py:Whole():nothing"], 2, "has no part 'nothing'", "modelcli params"),
        (["body", "ReLU()"], 2, "ReLU() has no tensors to take", "modelcli params"),
        (["nothing", "other.pth"], 2, "no module matches 'nothing'", None),
        (["body.conv.weight", "other.pth"], 2, "no module matches 'body.conv.weight'", None),
        (["body.*", "other.pth"], 2, "matches 3 modules, but graft takes one", None),
        (["body", "other.pth", "--source-key", "x"], 2, "x", None),
        (["body", "other.pth", "--source-weights", "DEFAULT"], 2, "--source-weights DEFAULT and the checkpoint", None),
        (["body", "other.pth:fc"], 1, "other.pth:fc does not fit body: no tensor has the same name", None),
        (["body.fc", "other.pth"], 1, "no tensor has the same name", "graft body.fc other.pth:fc"),
        (["body"], 2, "SOURCE", None),
        (["body", "other.pth", "--source-key", ""], 2, "--source-key takes a name, not an empty word", None),
        (["body", ""], 2, "graft takes a path and another model", None),
        (["body", ":body"], 2, "names no model", None),
        (["body", "own.py"], 2, "names a file, not a class", None),
        (["body", "whole.pth"], 3, "holds objects of", None),
    ],
)
@pytest.mark.parametrize("keys", [False, True])
def test_what_cannot_be_taken_is_refused(
    cli: Cli, keys: bool, words: list[str], code: int, message: str, hint: str | None
) -> None:
    torch.save(made("Whole()").state_dict(), "model.pth")
    torch.save(made("Part()").state_dict(), "other.pth")
    torch.save(nn.Linear(2, 2), "whole.pth")
    Path("empty").mkdir()
    Path("text.pth").write_text("no checkpoint")
    model = ["-m", "model.pth", *([] if keys else ["--arch", "own.py:Whole()"])]
    result = cli("graft", *words, *model, "-o", "out.pth", "--json", code=code)
    assert message in result.error["message"]
    if hint is not None:
        assert hint in result.error["hint"]
        if (line := result.error["hint"].rpartition(": ")[2]).startswith("graft "):
            cli("apply", "-e", line, *model)
    assert not Path("out.pth").exists()


def test_the_tensors_of_a_part_are_listed_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing them for each key takes minutes for 25,000 keys."""
    torch.save({f"l.{number}.w": torch.ones(1) for number in range(50)}, "a.pth")
    listed = Part.__dict__["tensors"].func
    calls: list[Part] = []

    def count(part: Part) -> object:
        calls.append(part)
        return listed(part)

    counting = cached_property(count)
    counting.__set_name__(Part, "tensors")
    monkeypatch.setattr(Part, "tensors", counting)
    cli("graft", ".", "a.pth", "-m", "a.pth", "-o", "b.pth")
    assert 1 <= len(calls) == len({id(part) for part in calls}) < 5


def test_the_root_is_called_the_model(cli: Cli) -> None:
    torch.save({"a.w": torch.ones(2), "more": torch.ones(2)}, "a.pth")
    torch.save({"a.w": torch.ones(2), "other": torch.ones(2)}, "b.pth")
    torch.save({}, "none.pth")
    assert "b.pth does not fit the model: missing" in cli("graft", ".", "b.pth", "-m", "a.pth", code=1).err
    left = cli("graft", ".", "b.pth", "--no-strict", "-m", "a.pth").err
    assert "other of b.pth is not taken: the model has no such key" in left
    assert "error: the model has no tensors" in cli("graft", ".", "b.pth", "-m", "none.pth", code=2).err


def test_a_hint_for_a_module_without_tensors(cli: Cli) -> None:
    torch.save({"w": torch.ones(2)}, "other.pth")
    error = cli("graft", "0", "other.pth", "-m", "Sequential(ReLU())", "--json", code=2).error
    assert error["message"] == "0 has no tensors"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("keys", [False, True])
def test_tensors_that_are_not_dense_are_refused_or_left(cli: Cli, keys: bool) -> None:
    torch.save({"a": torch.ones(2), "b": torch.zeros(2)}, "model.pth")
    torch.save({"a": torch.ones(2).to_sparse(), "b": torch.ones(2)}, "other.pth")
    with Path("own.py").open("a") as file:
        file.write("\n\nclass Two(nn.Module):\n    def __init__(self):\n        super().__init__()\n")
        file.write("        self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))\n")
    words = ["-m", "model.pth", *([] if keys else ["--arch", "own.py:Two()"])]
    error = cli("graft", ".", "other.pth", *words, "--json", code=2).error
    assert "graft takes dense tensors, and a is sparse" in error["message"]
    cli("graft", ".", "other.pth", "--no-strict", *words, "-o", "out.pth", "--check", "none")
    assert read("out.pth")["b"].tolist() == [1.0, 1.0]
    both(cli, *words, "-e", "graft . other.pth --no-strict")
    torch.save({"a": torch.ones(2).to_sparse(), "b": torch.zeros(2)}, "model.pth")
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, "other.pth")
    error = cli("graft", ".", "other.pth", "-m", "model.pth", "--json", code=2).error
    assert "graft takes dense tensors" in error["message"]


def test_tensors_that_share_bytes_with_others_are_refused(cli: Cli) -> None:
    whole = torch.arange(6.0)
    torch.save({"a.w": whole[:4], "b.w": whole[2:]}, "model.pth")
    torch.save({"w": torch.ones(4)}, "other.pth")
    error = cli("graft", "a", "other.pth", "-m", "model.pth", "--json", code=2).error
    assert "a.w and b.w show the same bytes" in error["message"]
    cli("apply", "-e", error["hint"], "-e", "graft a other.pth", "-m", "model.pth", "-o", "out.pth")
    assert read("out.pth")["a.w"].tolist() == [1.0] * 4
    model = nn.Module()
    model.register_buffer("a", whole[:4])
    model.register_buffer("b", whole[2:])
    torch.save({"a": torch.ones(4), "b": torch.ones(4)}, "both.pth")
    with pytest.raises(RequestError, match="a and b show the same bytes"):
        modelcli.apply(model, "graft . both.pth")


def test_a_refused_edit_leaves_a_live_model_as_it_was() -> None:
    model = made("Whole()")
    before = {name: value.clone() for name, value in plain(model).items()}
    torch.save(changed(made("Part()", 3)).state_dict(), "other.pth")
    with pytest.raises(ModelcliError):
        modelcli.apply(model, "graft body other.pth", "graft head other.pth")
    assert_equal(plain(model), before)


def test_a_lazy_module_is_refused(cli: Cli) -> None:
    torch.save({"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}, "other.pth")
    error = cli("graft", ".", "other.pth", "-m", "Sequential(LazyLinear(2))", "--json", code=2).error
    assert "graft takes dense tensors, and 0.weight" in error["message"]
