"""`script`: the printed script runs, and saves the same tensors as modelcli."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelcli import edits
from modelcli.errors import RequestError
from modelcli.live import scripting
from modelcli.live.providers import torchvision as builders
from modelcli.live.script.access_paths import module_expression
from modelcli.live.script.source_text import InexpressibleError, SourceText
from modelcli.live.script.step import Step
from tests import nets
from tests.conftest import Cli

#: Python modules that tests write. They are forgotten before a script runs, so that it imports its own.
OWN = ("nets", "own", "models", "init")


def run(text: str) -> dict[str, Any]:
    """Run a script in this process as in a new one: without imported user modules, with an unseeded generator."""
    builders.torchvision()  # for a torchvision that was built for another torch
    kept, hidden = list(sys.path), {name: sys.modules.pop(name) for name in OWN if name in sys.modules}
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "modelcli"}
    sys.modules.update(dict.fromkeys(ours))  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    importlib.invalidate_caches()  # Python may have cached the contents of another test's folder
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            exec(compile(text, "script.py", "exec"), found)
    finally:
        sys.modules.update(ours)
        sys.path[:] = kept
        for name in OWN:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
    return found


def tensors(path: str) -> dict[str, Any]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return dict(load_file(path))
    return dict(torch.load(path, weights_only=True))


def same(found: Any, expected: Any) -> bool:
    """Whether two trees of values are equal, tensors bit by bit and in the same dtype."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    return bool(found == expected)


def shared(state: dict[str, Any]) -> set[frozenset[str]]:
    """The names of the tensors that share a storage."""
    groups: dict[int, set[str]] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.numel():
            groups.setdefault(value.untyped_storage().data_ptr(), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def both(cli: Cli, *words: str, suffix: str = "pth") -> str:
    """Save with modelcli and with the script, and compare the files, ties included. Returns the script."""
    result = cli("script", *words, "-o", f"theirs.{suffix}")
    Path(f"ours.{suffix}").unlink(missing_ok=True)
    if "-e" in words:
        cli("apply", *words, "-o", f"ours.{suffix}", "--check", "none")
    else:
        cli("save", f"ours.{suffix}", *words)
    run(result.out)
    theirs, ours = tensors(f"theirs.{suffix}"), tensors(f"ours.{suffix}")
    assert same(theirs, ours)
    if suffix == "pth":
        assert list(theirs) == list(ours)
    assert shared(theirs) == shared(ours)
    return result.out


# --- where a model comes from --------------------------------------------------------------------------------------


def test_a_builder_and_its_statements(cli: Cli) -> None:
    lines = ["-e", "replace classifier.6 Linear(_,10)", "-e", "freeze features"]
    assert cli("script", "-m", "alexnet", *lines, "-o", "head10.pth").out == (
        """\
import torch
from torch import nn
from torchvision import models

torch.manual_seed(0)
model = models.alexnet()

# replace classifier.6 Linear(_,10)
torch.manual_seed(1)
model.classifier[6] = nn.Linear(4096, 10)

# freeze features
model.features.requires_grad_(False)

torch.save(model.state_dict(), "head10.pth")
"""
    )


@pytest.mark.parametrize(
    ("model", "statement"),
    [
        ("squeezenet1_1(num_classes=3)", "model = models.squeezenet1_1(num_classes=3)"),
        ("Sequential(Linear(2,3),Permute([1,0]))", "model = nn.Sequential(nn.Linear(2, 3), ops.Permute([1, 0]))"),
        ("Linear(2,3,bias=False,dtype=torch.float16)", "model = nn.Linear(2, 3, bias=False, dtype=torch.float16)"),
        ("nets.py:MyLinear(3,2)", "model = MyLinear(3, 2)"),
        ("nets.py:Tied", "model = Tied()"),
        ("nets:build(depth=3)", "model = build(depth=3)"),
        ("Sequential(nets:MyLinear(3,2))", "model = nn.Sequential(nets.MyLinear(3, 2))"),
        ("odd-name.py:Holder.build()", 'model = odd_name["Holder"].build()'),
        ("sub/own.py:Own", "model = Own()"),
    ],
)
def test_the_statement_for_each_kind_of_reference(cli: Cli, folder: Path, model: str, statement: str) -> None:
    (folder / "odd-name.py").write_text(
        "from torch import nn\nclass Holder:\n    @staticmethod\n    def build():\n        return nn.Linear(2, 2)\n"
    )
    (folder / "sub").mkdir()
    (folder / "sub" / "helper.py").write_text("from torch import nn\nBase = nn.Linear\n")
    (folder / "sub" / "own.py").write_text(
        "from helper import Base\nclass Own(Base):\n    def __init__(self):\n        super().__init__(3, 3)\n"
    )
    assert statement in both(cli, "-m", model, "--seed", "7").splitlines()


CLASS = """
from torch import randn
from torch.nn import Linear, Module

class {name}(Module):
    def __init__(self):
        super().__init__()
        self.fc = Linear(2, 2)
        self.register_buffer("drawn", randn(3))
"""


@pytest.mark.parametrize(
    "name", ["init", "nn", "models", "ops", "torch", "sys", "model", "state", "name", "save_file", "list", "os"]
)
def test_a_class_with_a_name_that_the_script_uses(cli: Cli, folder: Path, name: str) -> None:
    """The script imports it under another name."""
    (folder / "own.py").write_text(CLASS.format(name=name))
    lines = ["-e", "replace fc Linear(2,3)", "-e", "init fc normal", "-e", "add more Permute([0,1])"]
    out = both(cli, "-m", f"own.py:{name}", *lines, suffix="safetensors")
    assert f"from own import {name} as own_{name}" in out.splitlines()
    out = both(cli, "-m", f"own:{name}", *lines)
    assert f"model = own_{name}()" in out.splitlines()


@pytest.mark.parametrize("file", ["init", "models", "torch", "random", "sys", "numpy"])
def test_a_file_with_the_name_of_a_module_that_the_script_imports(cli: Cli, folder: Path, file: str) -> None:
    """The script imports a file if Python's import finds it by its name; it runs other files."""
    (folder / "own").mkdir()
    (folder / "own" / f"{file}.py").write_text(CLASS.format(name=file))
    lines = ["-e", "init fc normal", "-e", "add more Permute([0,1])"]
    both(cli, "-m", f"own/{file}.py:{file}", *lines, suffix="safetensors")


def test_modules_with_names_that_the_script_uses(cli: Cli, folder: Path) -> None:
    for name in ("models", "init"):
        (folder / f"{name}.py").write_text(CLASS.format(name="Own"))
    lines = ["-e", "replace 1 init:Own", "-e", "init 0 normal", "-e", "append . models:Own"]
    out = both(cli, "-m", "Sequential(Linear(2,2),ReLU())", *lines)
    assert "import init as own_init" in out.splitlines()
    assert "model.append(own_models.Own())" in out.splitlines()


def test_random_values_drawn_by_an_imported_file_do_not_change_the_result(cli: Cli, folder: Path) -> None:
    """The file is loaded before the script sets the seed, whatever its name is."""
    for name in ("own.py", "own-nets.py", "random.py"):
        (folder / name).write_text(CLASS.format(name="Own") + "\nrandn(5)\n")
        both(cli, "-m", f"./{name}:Own", "-e", "replace fc Linear(2,3)")


def test_the_folder_of_the_result_is_made(cli: Cli) -> None:
    run(cli("script", "-m", "Linear(2,3)", "-o", "new/folder/out.pth").out)
    assert set(tensors("new/folder/out.pth")) == {"weight", "bias"}
    run(cli("script", "-m", "Linear(2,3)", "-o", "other/out.safetensors").out)
    assert set(tensors("other/out.safetensors")) == {"weight", "bias"}
    assert "makedirs" not in cli("script", "-m", "Linear(2,3)", "-o", "out.pth").out


def test_weights_of_torchvision(cli: Cli) -> None:
    out = cli("script", "-m", "fcn_resnet50", "--weights", "DEFAULT").out
    assert (
        'model = models.segmentation.fcn_resnet50(weights="COCO_WITH_VOC_LABELS_V1", weights_backbone=None)' in out
        or 'model = models.get_model("fcn_resnet50", weights="COCO_WITH_VOC_LABELS_V1", weights_backbone=None)' in out
    )
    assert "manual_seed" not in out


def test_an_instance_has_the_values_of_its_file(cli: Cli) -> None:
    result = cli("script", "-m", "nets.py:instance", "-e", "freeze .")
    assert "model = instance" in result.out
    assert "gets its values when its file runs" in result.err


# --- checkpoints ---------------------------------------------------------------------------------------------------


def trained(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nets.Net()


def test_a_checkpoint_with_an_architecture(cli: Cli) -> None:
    torch.save(nn.DataParallel(trained()).state_dict(), "parallel.pth")
    out = both(cli, "-m", "parallel.pth", "--arch", "nets.py:Net", "-e", "replace conv2 Conv2d(_,7,1)")
    assert 'state = {key.removeprefix("module."): value for key, value in state.items()}' in out
    assert "torch.manual_seed(0)" not in out  # all values come from the file


def test_weights_from_a_file(cli: Cli) -> None:
    torch.save(trained().state_dict(), "best.pth")
    assert 'torch.load("best.pth", map_location="cpu", weights_only=True)' in both(
        cli, "-m", "nets.py:Net", "--weights", "best.pth"
    )


def test_a_file_in_half_precision_keeps_its_dtype(cli: Cli) -> None:
    torch.save(trained().half().state_dict(), "half.pth")
    out = both(cli, "-m", "half.pth", "--arch", "nets.py:Net", "-e", "replace conv2 Conv2d(_,7,1)")
    assert "model.load_state_dict(state, assign=True)" in out
    assert "nn.Conv2d(3, 7, 1).to(torch.float16)" in out


def test_values_that_the_file_lacks_are_drawn(cli: Cli, folder: Path) -> None:
    state = trained().state_dict()
    del state["conv2.weight"]
    torch.save(state, "part.pth")
    (folder / "modelcli.toml").write_text('model = "part.pth"\narch = "nets.py:Net"\nstrict = false\nseed = 5\n')
    out = both(cli)
    assert "torch.manual_seed(5)" in out
    assert "model.load_state_dict(state, strict=False)" in out


def test_a_training_checkpoint(cli: Cli) -> None:
    torch.save({"epoch": 3, "state_dict": trained().state_dict()}, "training.pth")
    words = ["-m", "training.pth", "--arch", "nets.py:Net", "-e", "replace conv2 Conv2d(_,7,1)"]
    both(cli, *words)
    assert tensors("theirs.pth")["epoch"] == 3
    run(cli("script", *words, "-o", "bare.pth", "--bare").out)
    assert "conv2.weight" in tensors("bare.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_that_modelcli_wrote(cli: Cli, suffix: str) -> None:
    """The script contains the edits of the record, and requires_grad is that of the file."""
    lines = ["-e", "replace 2 Linear(_,5)", "-e", "freeze 0.weight", "-e", "replace 1 GELU", "-e", "init 2 normal"]
    cli("apply", *lines, "-m", "Sequential(Linear(4,4),ReLU(),Linear(4,2))", "-o", f"first.{suffix}", "--seed", "2")
    out = both(cli, "-m", f"first.{suffix}", "-e", "replace 2 Linear(_,7)", suffix=suffix)
    assert "init." not in out  # the values are those of the file
    found = run(out)["model"]
    assert isinstance(found[1], nn.GELU)
    assert [name for name, p in found.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert found[2].out_features == 7


def test_a_folder_of_shards(cli: Cli, folder: Path) -> None:
    from safetensors.torch import save_file

    state = trained().state_dict()
    (folder / "shards").mkdir()
    names = list(state)
    files = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, keys in files.items():
        save_file({key: state[key] for key in keys}, folder / "shards" / file)
    index = {key: file for file, keys in files.items() for key in keys}
    (folder / "shards" / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": ' + str(index).replace("'", '"') + "}"
    )
    both(cli, "-m", "shards/", "--arch", "nets.py:Net", "-e", "freeze bn")


def test_safetensors_with_tied_tensors(cli: Cli) -> None:
    both(cli, "-m", "nets.py:Tied", "-e", "freeze body", suffix="safetensors")
    state = {"a": torch.arange(6.0), "c": torch.arange(6.0).reshape(2, 3).T}
    state |= {"again": state["a"], "part": state["a"][2:4]}
    torch.save(state, "views.pth")
    both(cli, "-m", "views.pth", "-e", "rename c d", suffix="safetensors")


# --- edits of a model ----------------------------------------------------------------------------------------------

BASES = {
    "sequential": "Sequential(Linear(4,4),ReLU(),Sequential(Linear(4,4),ReLU()),Linear(4,2))",
    "named": "nets.py:Net",
    "dict, list, shared": "own.py:Odd",
    "builder": "squeezenet1_1(num_classes=2)",
}
ODD = """
from collections import OrderedDict
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.first = nn.Sequential(OrderedDict([("lin", shared), ("act", nn.ReLU())]))
        self.again = shared
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)])
        self.heads = nn.ModuleDict({"left": nn.Linear(4, 2), "right-most": nn.Linear(4, 2)})
        self.add_module("a b", nn.Linear(4, 4))
        self.add_module("class", nn.Linear(4, 4))
        self.add_module('"]; import os #', nn.Linear(2, 2))
"""


@pytest.mark.parametrize(
    ("base", "lines"),
    [
        ("sequential", ["replace 0 Linear(_,_,bias=False)", "replace **:ReLU PReLU()", "replace 2.0 Linear(4,4)"]),
        ("sequential", ["replace 2 Sequential(Linear(4,6),ReLU(),Linear(6,4))", "freeze 2", "unfreeze 2.0.weight"]),
        ("named", ["replace bn GroupNorm(3,3)", "freeze .", "unfreeze conv2 bn.bias"]),
        ("dict, list, shared", ["replace **:Linear Linear(4,4)", "replace heads.left Linear(4,9)"]),
        ("dict, list, shared", ["replace blocks.*.0 Linear(4,4,bias=False)", "freeze blocks.*.0 --except blocks.3"]),
        ("dict, list, shared", ["replace heads.* Linear(4,3)", "replace '{a b,class}' Linear(4,4)"]),
        ("dict, list, shared", ["freeze . --except again", "unfreeze blocks.[1-4]"]),
        ("dict, list, shared", ["replace '\"\\]; import os #' Linear(2,2)"]),
        ("builder", ["replace **:ReLU PReLU()", "freeze features --except **.bias",
                     "replace classifier.1 Conv2d(_,4,1)"]),
    ],
)  # fmt: skip
def test_replace_and_flags(cli: Cli, folder: Path, base: str, lines: list[str]) -> None:
    (folder / "own.py").write_text(ODD)
    words = [word for line in lines for word in ("-e", line)]
    out = both(cli, "-m", BASES[base], "--seed", "4", *words)
    model = run(out)["model"]
    frozen = {row["name"] for row in cli("params", "ours.pth", "--frozen", "--json", "--trust").json["tensors"]}
    assert {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad} == frozen


HEADSTRONG = """
from torch import nn

def refuse(*args, **kwargs):
    raise RuntimeError("not in this way")

class Uncounted(nn.Sequential):
    def __len__(self):
        return 7

class Fixed(nn.Sequential):
    append = insert = __getitem__ = __setitem__ = __delitem__ = refuse

class List(nn.ModuleList):
    append = insert = __getitem__ = __setitem__ = __delitem__ = refuse

class Dict(nn.ModuleDict):
    __getitem__ = __setitem__ = __delitem__ = refuse

class Guarded(nn.Module):
    add_module = __delattr__ = refuse
    def __init__(self):
        super().__init__()
        self._modules["fc"] = nn.Linear(4, 4)
    def __setattr__(self, name, value):
        refuse() if isinstance(value, nn.Module) else super().__setattr__(name, value)

class Stubborn(nn.Module):
    to = requires_grad_ = refuse
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.uncounted = Uncounted(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.fixed = Fixed(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.list = List([nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)])
        self.dict = Dict()
        self.dict.add_module("a", nn.Linear(4, 4))
        self.dict.add_module("b", nn.Linear(4, 4))
        self.stubborn = Stubborn()
        self.guarded = Guarded()
"""


@pytest.mark.parametrize(
    "lines",
    [
        ["replace '{uncounted,fixed,list}.[0-1]' Linear(4,4)", "replace dict.b Linear(4,3)"],
        ["replace '{uncounted,fixed,list}.-1' Linear(4,2)"],
        ["insert uncounted.1 PReLU()", "insert fixed.0 PReLU()", "insert list.3 PReLU()"],
        ["append uncounted PReLU()", "append fixed PReLU()", "append list PReLU()", "add dict.c PReLU()"],
        ["remove uncounted.0 fixed.0 fixed.1 list.-1 dict.a"],
        ["replace guarded.fc Linear(4,2)", "add guarded.more PReLU()"],
        ["remove guarded.fc"],
        ["freeze .", "unfreeze stubborn"],
        ["cast . float16"],
    ],
)
def test_classes_with_methods_of_their_own(cli: Cli, folder: Path, lines: list[str]) -> None:
    """If a class overrides a method of torch, the script does without that method."""
    (folder / "own.py").write_text(HEADSTRONG)
    both(cli, "-m", "own.py:Own", *(word for line in lines for word in ("-e", line)))


def test_the_working_recipe(cli: Cli) -> None:
    cli("load", "nets.py:Net", "--seed", "3")
    cli("freeze", "bn")
    cli("replace", "conv2", "Conv2d(_,7,1)")
    both(cli)
    both(cli, "-e", "replace conv2 Conv2d(_,9,1)")


def test_a_new_module_has_the_mode_and_dtype_of_the_old_one(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Linear(2, 2), nn.Dropout()).to(torch.bfloat16).eval()\n"
    )
    model = run(both(cli, "-m", "own.py:build", "-e", "replace 0 Linear(2,3)", "-e", "replace 1 PReLU()"))["model"]
    assert not model[0].training
    assert model[1].weight.dtype == torch.bfloat16


TIED = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        mask = torch.arange(4.0)
        self.a.register_buffer("mask", mask)
        self.b.register_buffer("mask", mask)
        self.b.bias = self.a.bias
        both = torch.randn(2, 3, 4)
        self.left, self.right = nn.Parameter(both[0]), nn.Parameter(both[1].T)
        self.again = nn.Parameter(self.c.weight.data)
"""


@pytest.mark.parametrize(
    "line",
    [
        "cast . float16", "cast a float16", "cast b c again float16", "cast . float16 --except c --except again",
        "cast left right c.running_mean float64", "cast a.mask float64", "cast b.bias c.weight again float16",
    ],
)  # fmt: skip
def test_a_cast_keeps_ties(cli: Cli, folder: Path, line: str) -> None:
    """Shared buffers, tied parameters and views of one storage stay shared, tied and views."""
    (folder / "own.py").write_text(TIED)
    both(cli, "-m", "own.py:Tied", "-e", line)
    assert len(shared(tensors("theirs.pth"))) == 4
    Path("theirs.pth").rename("cast.pth")
    both(cli, "-m", "cast.pth", "--arch", "own.py:Tied", "-e", "cast . bfloat16")
    assert len(shared(tensors("theirs.pth"))) == 4


def test_a_cast_of_one_tensor_alone_is_one_statement(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(TIED)
    out = both(cli, "-m", "own.py:Tied", "-e", "cast a b float16")
    assert "model.a.mask.data = model.a.mask.data.to(torch.float16)" in out.splitlines()
    assert "cast_views" not in out


# Each pair is an edit and the statement of plain PyTorch that its documentation shows.
def plain() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model.heads = nn.ModuleDict({"left": nn.Linear(4, 2)})
    model.fc = nn.Linear(4, 2)
    return model


@pytest.mark.parametrize(
    ("line", "statement", "expected"),
    [
        ("add features.drop Dropout(0.5)", lambda m: m.features.add_module("drop", nn.Dropout(0.5)),
         'model.features.add_module("drop", nn.Dropout(0.5))'),
        ("add heads.right Linear(4,3)", lambda m: m.heads.update({"right": nn.Linear(4, 3)}),
         'model.heads["right"] = nn.Linear(4, 3)'),
        ("insert features.1 Conv2d(4,4,1)", lambda m: m.features.insert(1, nn.Conv2d(4, 4, 1)),
         "model.features.insert(1, nn.Conv2d(4, 4, 1))"),
        ("append features Linear(4,4)", lambda m: m.features.append(nn.Linear(4, 4)),
         "model.features.append(nn.Linear(4, 4))"),
        ("remove features.1 features.2 fc", lambda m: (m.features.pop(1), m.features.pop(1), m.__delattr__("fc")),
         "del model.features[1]"),
        ("remove heads.left", lambda m: m.heads.pop("left"), 'del model.heads["left"]'),
        ("cast features bfloat16", lambda m: m.features.to(torch.bfloat16), "model.features.to(torch.bfloat16)"),
        ("cast fc.weight float64", lambda m: setattr(m.fc.weight, "data", m.fc.weight.data.double()),
         "model.fc.weight.data = model.fc.weight.data.to(torch.float64)"),
        ("cast features.1.running_mean float64", lambda m: m.features[1].register_buffer(
            "running_mean", m.features[1].running_mean.double()),
         "model.features[1].running_mean.data = model.features[1].running_mean.data.to(torch.float64)"),
        ("init features.0.weight kaiming_normal(nonlinearity='relu')",
         lambda m: nn.init.kaiming_normal_(m.features[0].weight, nonlinearity="relu"),
         'init.kaiming_normal_(model.features[0].weight, nonlinearity="relu")'),
        ("init fc normal(0,0.01) --bias uniform", lambda m: (nn.init.normal_(m.fc.weight, 0, 0.01),
         nn.init.uniform_(m.fc.bias)), "init.uniform_(model.fc.bias)"),
        ("init fc default", lambda m: m.fc.reset_parameters(), "model.fc.reset_parameters()"),
    ],
)  # fmt: skip
def test_each_edit_is_its_statement(line: str, statement: Callable[[Any], object], expected: str) -> None:
    before, after = plain(), plain()
    torch.manual_seed(8)
    statement(after)
    lines = _statements(line.replace("'", '"') if "(" not in line else line, before, after, 8)
    assert expected in lines
    model = plain()
    _execute(lines, model)
    assert same(model.state_dict(), after.state_dict())
    assert repr(model) == repr(after)


def test_extract() -> None:
    model = plain()
    assert _statements("extract features.0", model, model.features[0], None) == ["model = model.features[0]"]


def test_keep_weights_copies_what_overlaps() -> None:
    before, after = plain(), plain()
    torch.manual_seed(3)
    new = nn.Linear(6, 3)
    with torch.no_grad():
        new.weight[:2, :4] = before.fc.weight
        new.bias[:2] = before.fc.bias
    after.fc = new
    script = SourceText()
    edit = edits.parse("replace fc Linear(6,3) --keep-weights")
    script.write(*scripting.statements([edit], Step(script, before, after, 3)))
    model = plain()
    exec(script.text(), {"model": model})
    assert same(model.state_dict(), after.state_dict())


def _statements(line: str, before: nn.Module, after: nn.Module, seed: int | None) -> list[str]:
    edit = edits.parse(line) if "'" not in line else edits.from_words(*_split(line))
    return scripting.statements([edit], Step(SourceText(), before, after, seed))


def _split(line: str) -> tuple[str, list[str]]:
    first, *rest = line.split(" ")
    return first, rest


def _execute(lines: list[str], model: nn.Module) -> None:
    exec("\n".join(lines), {"torch": torch, "nn": nn, "init": nn.init, "model": model})


# --- edits of a bare checkpoint ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "statement"),
    [
        (["rename module.** **"], 'state = {key.removeprefix("module."): value for key, value in state.items()}'),
        (["rename ** net.**"], 'state = {"net." + key: value for key, value in state.items()}'),
        (
            ["rename module.conv1.* module.stem.*"],
            'state = {"module.stem." + key.removeprefix("module.conv1.") if key.startswith("module.conv1.") else key:'
            " value for key, value in state.items()}",
        ),
        (["rename **.weight **.gamma"], '    "module.bn.weight": "module.bn.gamma",'),
        (["freeze .", "rename module.bn.bias offset"], "# a state dict holds no requires_grad: nothing to do"),
        (["replace module.conv2 Conv2d(3,7,1)"], "new = nn.Conv2d(3, 7, 1)"),
    ],
)
@pytest.mark.parametrize("source", ["bare.pth", "training.pth", "bare.safetensors"])
def test_edits_of_keys(cli: Cli, source: str, lines: list[str], statement: str) -> None:
    from safetensors.torch import save_file

    state = nn.DataParallel(trained()).state_dict()
    torch.save(state, "bare.pth")
    torch.save({"epoch": 3, "model": state}, "training.pth")
    save_file(state, "bare.safetensors")
    words = [word for line in lines for word in ("-e", line)]
    assert statement in both(cli, "-m", source, *words).splitlines()


def test_a_cast_keeps_ties_of_keys(cli: Cli) -> None:
    value, other = torch.arange(12.0), torch.arange(4.0)
    state = {"a.x": value, "b.x": value.detach(), "part": value[2:6].view(2, 2), "n": torch.arange(3)}
    state |= {f"c.{number}": torch.full((2,), float(number)) for number in range(6)}
    state |= {"d": other, "e": other.half(), "f": other.view(2, 2).T}
    torch.save(state, "tied.pth")
    assert "value.to(torch.bfloat16) if value.is_floating_point() else value" in both(
        cli, "-m", "tied.pth", "-e", "cast . bfloat16"
    )
    assert shared(tensors("theirs.pth")) == {frozenset({"a.x", "b.x", "part"}), frozenset({"d", "f"})}
    both(cli, "-m", "tied.pth", "-e", "cast '{c,d,f}' 'c.*' float64")
    both(cli, "-m", "tied.pth", "-e", "cast c.[2-3] float64")


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("replace s.1 Linear(2,3)", "a.w s.0.weight s.0.bias s.1.weight s.1.bias s.2.weight s.2.bias z.weight"),
        ("replace a Linear(2,3)",
         "a.weight a.bias s.0.weight s.0.bias s.1.weight s.1.bias s.2.weight s.2.bias z.weight"),
        ("replace s.1 Linear(2,3,bias=False)", "a.w s.0.weight s.0.bias s.1.weight s.2.weight s.2.bias z.weight"),
        ("replace s.1 PReLU() --keep-weights", "a.w s.0.weight s.0.bias s.1.weight s.2.weight s.2.bias z.weight"),
        ("replace s.1 Sequential(Linear(2,2),PReLU())",
         "a.w s.0.weight s.0.bias s.1.0.weight s.1.0.bias s.1.1.weight s.2.weight s.2.bias z.weight"),
        ("replace s PReLU()", "a.w s.weight z.weight"),
        ("replace z Linear(1,2)",
         "a.w s.0.weight s.0.bias s.1.weight s.1.bias s.2.weight s.2.bias z.weight z.bias"),
        ("insert s.1 PReLU() --renumber",
         "a.w s.0.weight s.0.bias s.1.weight s.2.weight s.2.bias s.3.weight s.3.bias z.weight"),
        ("insert s.3 PReLU() --renumber",
         "a.w s.0.weight s.0.bias s.1.weight s.1.bias s.2.weight s.2.bias s.3.weight z.weight"),
        ("add a.more PReLU()",
         "a.w a.more.weight s.0.weight s.0.bias s.1.weight s.1.bias s.2.weight s.2.bias z.weight"),
        ("add more PReLU()", "a.w s.0.weight s.0.bias s.1.weight s.1.bias s.2.weight s.2.bias z.weight more.weight"),
        ("remove s.0 --renumber", "a.w s.0.weight s.0.bias s.1.weight s.1.bias z.weight"),
        ("rename s.0.* z.zero.*", "a.w z.zero.weight z.zero.bias s.1.weight s.1.bias s.2.weight s.2.bias z.weight"),
    ],
)  # fmt: skip
def test_keys_keep_their_order(cli: Cli, line: str, names: str) -> None:
    """New tensors take the positions of those that they replace; others follow the tensors of their module."""
    before = "a.w s.0.weight s.0.bias s.1.weight s.1.bias s.2.weight s.2.bias z.weight"
    torch.save({name: torch.ones(2) for name in before.split()}, "bare.pth")
    both(cli, "-m", "bare.pth", "-e", line)
    assert " ".join(tensors("theirs.pth")) == names
    both(cli, "-m", "bare.pth", "-e", line, "-e", "rename z.weight last", "-e", "replace a PReLU()")


@pytest.mark.parametrize(
    "lines",
    [
        ["replace b Linear(2,3)"],
        ["replace b Sequential(Linear(2,3),PReLU())", "rename b.0.weight t", "replace a ReLU() --untie"],
        ["remove a", "add b.more Linear(1,1)", "add more PReLU()"],
        ["rename b.** z.**", "replace c Linear(2,2)", "rename tied first"],
        ["replace '{a,b}' Linear(2,2) --untie", "cast . float16", "add b.act ReLU()"],
        ["extract a", "rename bias weights"],
    ],
)
def test_keys_in_an_order_of_their_own(cli: Cli, lines: list[str]) -> None:
    """The keys of a module are not together in this file."""
    state = {name: torch.ones(2) for name in ("b.weight", "a.weight", "b.bias", "c.weight", "a.bias", "last")}
    state["tied"] = state["a.weight"].detach()
    torch.save(state, "bare.pth")
    both(cli, "-m", "bare.pth", *(word for line in lines for word in ("-e", line)))


def test_many_keys_are_edited_by_their_prefix(cli: Cli) -> None:
    torch.save({f"{name}.{number}.weight": torch.ones(2) for name in "ab" for number in range(9)}, "bare.pth")
    out = both(cli, "-m", "bare.pth", "-e", "remove a")
    assert 'state = {key: value for key, value in state.items() if not key.startswith("a.")}' in out


# --- what has no statements----------------------------------------------------------------------------------------


def test_a_file_that_plain_pytorch_cannot_load(cli: Cli) -> None:
    """The script stops there, because it would save something else."""
    torch.save(nets.Net(), "pickled.pth")
    result = cli("script", "-m", "pickled.pth", "--tensors-only", "-e", "freeze .")
    assert "note: the script stops at 'read pickled.pth'" in result.err
    assert "# the file holds objects of foreign classes" in result.out
    with pytest.raises(NotImplementedError, match=r"read pickled.pth"):
        run(result.out)


def test_edits_that_plain_statements_cannot_express() -> None:
    with pytest.raises(RequestError, match="insert needs a Sequential or ModuleList"):
        _statements("insert heads.left ReLU", plain(), plain(), None)
    model = plain()
    with pytest.raises(InexpressibleError, match="some are kept"):
        _statements("init fc default --except fc.bias", model, model, None)


def test_an_edit_that_is_wrong_is_an_error(cli: Cli) -> None:
    error = cli("script", "-m", "nets.py:Net", "-e", "freeze bn", "-e", "freeze bm", "--json", code=2).error
    assert error["message"] == "-e 2: 'freeze bm': no tensor matches 'bm'"


# --- the text ------------------------------------------------------------------------------------------------------


def test_no_name_becomes_a_statement(cli: Cli) -> None:
    """Names, paths and lines become literals, and comments on one line."""
    name = "x'\"\nimport os; os.mkdir('made')\n#"
    torch.save({f"{name}.weight": torch.ones(2), "b.weight": torch.ones(2)}, "it's.pth")
    words = ["-m", "it's.pth", "-e", f'rename b.weight "{name[:1]}\nimport os; os.mkdir(1)"']
    both(cli, *words)
    assert not Path("made").exists()
    out = cli("script", *words).out
    assert out.isascii()
    assert 'torch.load("it\'s.pth"' in out


def test_expressions_for_modules() -> None:
    model = nn.Module()
    model.seq = nn.Sequential(nn.ReLU(), nn.Sequential())
    model.seq.add_module("named", nn.Sequential(nn.ReLU()))
    model.add_module("0", nn.ReLU())
    model.add_module("training.x".replace(".", "_"), nn.ReLU())
    for path, module in copy.deepcopy(model).named_modules():
        assert type(eval(module_expression(model, path), {"model": model})) is type(module)
        assert eval(module_expression(model, path), {"model": model}) is model.get_submodule(path)
    assert module_expression(model, "seq.0") == "model.seq.get_submodule('0')" or "get_submodule" in module_expression(
        model, "seq.0"
    )


def test_as_json_and_as_a_file(cli: Cli) -> None:
    words = ["-m", "nets.py:Net", "-e", "freeze bn"]
    assert cli("script", *words, "--json").json["script"] == cli("script", *words).out


@pytest.mark.parametrize("model", ["nets.py:Net", "Sequential(Linear(3,4),ReLU(),Linear(4,2))"])
def test_the_script_in_a_process_of_its_own(cli: Cli, folder: Path, model: str) -> None:
    last = "conv2" if "Net" in model else "2"
    new = "Conv2d(_,7,1)" if "Net" in model else "Linear(_,7)"
    words = ["-m", model, "-e", f"replace {last} {new}", "-e", "freeze ."]
    (folder / "script.py").write_text(cli("script", *words, "-o", "theirs.pth").out)
    cli("apply", *words, "-o", "ours.pth")
    code = "import sys; sys.modules['modelcli'] = None; exec(open('script.py').read())"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)
    assert same(tensors("theirs.pth"), tensors("ours.pth"))


def test_a_folder_of_shards_has_no_statement(cli: Cli) -> None:
    result = cli("script", "-m", "Linear(2,3)", "-o", "out/")
    assert result.out.endswith('raise NotImplementedError("write out/")\n')
    assert "the script stops at 'write out/': PyTorch has no statement that writes a folder of shards" in result.err


@pytest.mark.parametrize("command", ["script", "apply"])
@pytest.mark.parametrize(
    ("model", "quoted"),
    [
        ("best.pth", "best.pth"), ("nets.py:Net", "nets.py:Net"), ("nets.py", "nets.py"), ("alexnet", "alexnet"),
        ("missing.safetensors", "missing.safetensors"), ("Linear(2, 3)", "'Linear(2, 3)'"), ("shards", "shards"),
    ],
)  # fmt: skip
def test_the_hint_for_a_model_in_place_of_the_recipe(cli: Cli, command: str, model: str, quoted: str) -> None:
    torch.save(trained().state_dict(), "best.pth")
    Path("shards").mkdir()
    error = cli(command, model, "--json", code=2).error
    assert error["message"] == f"{model} is not a recipe"
    assert error["hint"] == f"-m names the model: -m {quoted}"


def test_a_recipe_may_be_called_anything(cli: Cli) -> None:
    for name in ("recipe", "recipe.txt", "recipe.toml"):
        Path(name).write_text('model = "nets.py:Net"\nedits = ["freeze bn"]\n')
        assert "model.bn.requires_grad_(False)" in cli("script", name).out


def test_a_note_says_that_the_edited_model_does_not_fit(cli: Cli) -> None:
    told = cli("script", "-e", "replace classifier.6 Linear(4095,10)", "-m", "alexnet").err
    told = " ".join(told.split())
    assert "the edited model does not fit, and modelcli itself would not write it: -e 1: 'replace classifier.6" in told
    assert "does not fit" not in cli("script", "-e", "replace classifier.6 Linear(_,10)", "-m", "alexnet").err


def test_script_takes_the_words_of_apply(cli: Cli) -> None:
    words = ("-e", "freeze layer1", "-m", "resnet18", "-o", "out.pth")
    more = ("--force", "--check", "none", "--no-fsync", "--verify", "--max-shard-size", "1GB", "--dry-run")
    assert cli("script", *words, *more).out == cli("script", *words).out
