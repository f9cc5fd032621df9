"""References to live models (builders, expressions, Python objects, checkpoints), and the errors of each."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import modelcli
from modelcli import edits, writing
from modelcli.errors import AnswerNoError, FileFormatError, RequestError, UnsafeError
from modelcli.language.references import Source
from modelcli.live import planning
from modelcli.live.opening import open_live
from modelcli.live.providers import torchvision as builders
from modelcli.live.sources import named_tensors, real_tensor
from modelcli.writing import WriteOptions
from tests import nets
from tests.conftest import Cli


def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- architectures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("nets.py:Net", "Net"),
        ("nets.py:Net()", "Net"),
        ("./nets.py:MyLinear(3,2)", "MyLinear"),
        ("nets.py:build", "Sequential"),
        ("nets.py:build(depth=3)", "Sequential"),
        ("nets.py:instance", "Sequential"),
        ("nets:MyLinear(3,2)", "MyLinear"),
        ("torchvision.models:alexnet", "AlexNet"),
        ("Sequential(Linear(20,30), ReLU())", "Sequential"),
        ("torch.nn.Linear(2,3)", "Linear"),
        ("alexnet(num_classes=10)", "AlexNet"),
    ],
)
def test_every_form_of_reference_opens(cli: Cli, reference: str, kind: str) -> None:
    assert cli("modules", reference, "--json").json["model"] == {"reference": reference, "class": kind}


def test_everything_is_on_meta_and_has_a_source(folder: Path) -> None:
    live = open_live(Source("nets.py:Tied"))
    torch.manual_seed(0)
    plain = nets.Tied()
    for name, tensor in named_tensors(live.module).items():
        assert tensor.is_meta, name
        assert torch.equal(real_tensor(tensor), named_tensors(plain)[name]), name
    assert live.module.head.weight is live.module.embed.weight


@pytest.mark.parametrize(
    "body",
    [
        "self.rates = [x.item() for x in torch.linspace(0, 1, 3)]; self.lin = nn.Linear(2, 2)",
        "self.lin = nn.Linear(2, 2); self.norm = float(self.lin.weight.detach().abs().sum()) >= 0",
        "self.lin = nn.Linear(2, 2); self.scale = self.lin.weight.detach().numpy().shape",
        "self.register_buffer('table', torch.tensor([1.0, 2.0]).cumsum(0)); self.lin = nn.Linear(2, 2)",
    ],
)
def test_constructors_that_need_values(folder: Path, body: str) -> None:
    """A model that cannot be built on the meta device is built with values, and then moved to meta."""
    (folder / "own.py").write_text(
        "import torch\nfrom torch import nn\nclass M(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        {body}\n"
    )
    live = open_live(Source("own.py:M"))
    assert all(tensor.is_meta for tensor in named_tensors(live.module).values())
    assert real_tensor(live.module.lin.weight).shape == (2, 2)


def test_an_instance_keeps_its_values(cli: Cli) -> None:
    cli("save", "out.pth", "-m", "nets.py:instance")
    rows = cli("params", "nets.py:instance", "--values", "--json").json["tensors"]
    assert torch.load("out.pth", weights_only=True)["0.weight"].shape == (2, 3)
    assert len(rows[0]["values"]) == 2


def test_output_printed_by_a_file_is_kept_apart_from_data(cli: Cli, folder: Path) -> None:
    (folder / "loud.py").write_text(
        "from torch import nn\nprint('hello')\nclass M(nn.Linear):\n"
        "    def __init__(self):\n        print('made')\n        super().__init__(2, 2)\n"
    )
    result = cli("modules", "loud.py:M", "--json")
    assert result.json["model"]["class"] == "M"
    assert "printed: hello" in result.json["notes"]  # standard error contains at most the document of an error


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("alexnt", "no model is called 'alexnt'", "did you mean alexnet"),
        ("resnet19(num_classes=3)", "no model is called 'resnet19'", "resnet18"),
        ("Linar(2,3)", "no model is called 'Linar'", "Linear"),
        ("nets.py", "names a file, not a class", "nets.py:Net"),
        ("nets.py:Nett", "no 'Nett' in nets.py", "Net"),
        ("nts.py:Net", "no such file: nts.py", "nets.py"),
        ("missing.pth", "no such file: missing.pth", None),
        ("runs/missing.pth", "no such file: runs/missing.pth", "the folder runs does not exist"),
        ("nets.py:MyLinear(3)", "missing a required argument: 'out_features'", "MyLinear(in_features: int"),
        ("nets.py:MyLinear(_,2)", "_ keeps an old argument, but there is no old module", "write the argument out"),
        ("Linear(2)", "missing a required argument", "Linear(in_features: int"),
        ("nosuchmodule:Net", "no module named nosuchmodule", "nets.py:Net"),
        ("nets.py:torch", "nets.py:torch is the Python module torch, not an nn.Module, its class, or a function", None),
        ("", "an empty model reference", "alexnet"),
    ],
)
def test_references_that_are_wrong(folder: Path, reference: str, message: str, hint: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        open_live(Source(reference))
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_a_file_that_raises_is_named_with_its_line(folder: Path) -> None:
    (folder / "broken.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(RequestError, match="ZeroDivisionError") as caught:
        open_live(Source("broken.py:Net"))
    assert str(caught.value.hint).endswith("broken.py:2")


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_carries_its_architecture(cli: Cli) -> None:
    """Tied weights, a non-persistent buffer and a plain tensor attribute are as the constructor makes them."""
    cli("replace", "body", "Linear(4,4,bias=False)", "-m", "nets.py:Tied", "-o", "tied.pth", "--seed", 4)
    model = modelcli.load("tied.pth", trust=True)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.positions, torch.arange(4.0))
    assert torch.equal(model.temperature, torch.tensor([2.0]))
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 11)
    torch.manual_seed(4)
    plain = nets.Tied()
    torch.manual_seed(4 * 1_000_003 + 1)
    plain.body = nn.Linear(4, 4, bias=False)
    assert same(model, plain)
    tokens = torch.randint(0, 11, (2, 5))
    assert torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_both_formats_record_the_architecture(cli: Cli, suffix: str) -> None:
    cli("replace", "1", "Linear(3,5)", "-m", "Sequential(Linear(2,3),Linear(3,4))", "-o", f"out.{suffix}")
    cli("freeze", "0", "-m", f"out.{suffix}", "-o", f"frozen.{suffix}")
    model = modelcli.load(f"frozen.{suffix}")
    assert repr(model) == repr(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5)))
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    first = modelcli.load(f"out.{suffix}")
    assert same(model, first)


def test_the_record_keeps_the_original_reference_and_every_edit(cli: Cli) -> None:
    """Editing such a file again records the original reference, not the file's path."""
    from modelcli import checkpoints

    cli("replace", "fc", "Linear(_,7)", "-m", "resnet18(num_classes=9)", "-o", "a.pth", "--seed", 5)
    cli("freeze", "layer*", "-m", "a.pth", "-o", "b.safetensors")
    cli("replace", "**:ReLU", "GELU", "-m", "b.safetensors", "-o", "c.pth")
    record = checkpoints.read(Path("c.pth")).record
    assert record is not None
    assert record.reference == "resnet18(num_classes=9)"
    assert record.seed == 5
    assert record.edits[:2] == ("replace fc Linear(512,7)", "freeze layer1 layer2 layer3 layer4")
    assert record.edits[2] == "replace relu GELU()"
    assert len(record.edits) == 2 + 9
    assert "layer1.0.conv1.weight" in record.frozen
    assert "fc.weight" not in record.frozen
    model = modelcli.load("c.pth")
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_a_record_that_names_code_needs_trust(cli: Cli, folder: Path) -> None:
    cli("save", "out.pth", "-m", "nets.py:Net")
    (folder / "nets.py").write_text("raise SystemExit('ran')\n")
    assert cli("summary", "out.pth", "--json").json["model"]["class"] == "Net"  # showing runs no code
    for words in (("freeze", ".", "-m", "out.pth"), ("save", "x.pth", "-m", "out.pth"), ("load", "out.pth")):
        error = cli(*words, code=3).err
        assert "nets.py:Net" in error
        assert "--trust" in error
        assert "--arch" in error
    with pytest.raises(UnsafeError):
        modelcli.load("out.pth")


def test_trust_follows_the_record_and_arch_replaces_it(cli: Cli) -> None:
    cli("replace", "conv2", "Conv2d(3,7,1)", "-m", "nets.py:Net", "-o", "runs/out.pth")
    model = modelcli.load("runs/out.pth", trust=True)  # ../nets.py, relative to the file
    assert model.conv2.out_channels == 7
    with pytest.raises(AnswerNoError, match=r"conv2.weight is \[7, 3, 1, 1\]"):
        modelcli.load("runs/out.pth", arch="nets.py:Net")
    cli("freeze", "bn", "-m", "runs/out.pth", "--trust", "-o", "runs/two.pth")
    cli("freeze", "bn", "-m", "runs/out.pth", "--arch", "nets.py:Net", code=1)
    cli("load", "runs/out.pth", "--trust")
    assert "trust = true" in Path("modelcli.toml").read_text()
    cli("freeze", "conv1")  # the recipe is the user's own, so its trust lasts


def test_a_users_module_in_recorded_edits_needs_trust(cli: Cli) -> None:
    cli("replace", "1", "nets:MyLinear(3,2)", "-m", "Sequential(Linear(2,3),Linear(3,4))", "-o", "out.pth")
    error = cli("freeze", "0", "-m", "out.pth", code=3).err
    assert "nets:MyLinear" in error
    assert modelcli.load("out.pth", trust=True)(torch.zeros(1, 2)).shape == (1, 2)


def test_a_record_that_disagrees_with_the_tensors_is_ignored(cli: Cli) -> None:
    cli("save", "out.pth", "-m", "Sequential(Linear(2,3))")
    state = torch.load("out.pth", weights_only=True)
    state["0.weight"] = torch.zeros(9, 2)
    torch.save(state, "out.pth")
    result = cli("modules", "out.pth", "--json")
    assert "the record in out.pth was ignored: 0.weight is [9, 2]" in result.json["notes"][0]
    assert result.json["model"]["class"] is None
    with pytest.raises(RequestError, match="records no architecture"):
        modelcli.load("out.pth")


def test_a_bare_checkpoint_is_still_a_model(cli: Cli) -> None:
    torch.save(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).state_dict(), "bare.pth")
    rows = cli("params", "bare.pth", "--json").json["tensors"]
    assert [(row["name"], row["kind"], row["trainable"]) for row in rows][:2] == [
        ("0.weight", "parameter", None),
        ("0.bias", "parameter", None),
    ]
    assert [row["kind"] for row in rows if "running" in row["name"]] == ["buffer", "buffer"]
    modules = cli("modules", "bare.pth", "--json").json["modules"]
    assert [(row["path"], row["type"]) for row in modules] == [(".", None), ("0", None), ("1", None)]
    summary = cli("summary", "bare.pth")
    assert "the file records no architecture" in summary.out
    cli("freeze", "0", "-m", "bare.pth", "-o", "frozen.pth")
    assert [r["name"] for r in cli("params", "frozen.pth", "--frozen", "--json").json["tensors"]] == [
        "0.weight",
        "0.bias",
    ]


def test_arch_for_a_bare_checkpoint(cli: Cli) -> None:
    torch.manual_seed(8)
    plain = builders.torchvision().models.squeezenet1_1(num_classes=3)
    torch.save(plain.state_dict(), "bare.pth")
    model = modelcli.load("bare.pth", arch="squeezenet1_1(num_classes=3)")
    assert same(model, plain)
    own = builders.torchvision().models.squeezenet1_1(num_classes=3)
    assert modelcli.load("bare.pth", arch=own) is own
    assert same(own, plain)
    result = cli("summary", "bare.pth", "--arch", "squeezenet1_1", code=1)
    assert "classifier.1.weight is [3, 512, 1, 1] in the file" in result.err


def test_a_module_is_filled_from_no_file_that_names_foreign_classes(folder: Path) -> None:
    """An instance as `arch` behaves like a reference as `arch`."""
    model = torch.nn.Linear(2, 3)
    torch.save(model, "whole.pth")
    for arch in (torch.nn.Linear(2, 3), "Linear(2,3)"):
        with pytest.raises(UnsafeError, match=r"modules\.linear\.Linear"):
            modelcli.load("whole.pth", arch=arch)
    torch.save(model.state_dict(), "plain.pth")
    with pytest.raises(RequestError, match="both say where the values come from"):
        modelcli.load("plain.pth", arch=torch.nn.Linear(2, 3), weights="DEFAULT")


def test_training_checkpoints(cli: Cli) -> None:
    state = nn.Linear(2, 3).state_dict()
    torch.save({"epoch": 3, "model": state, "ema": state, "optimizer": {"lr": 0.1}}, "train.pth")
    result = cli("params", "train.pth")
    assert "took the state dict under 'model' of train.pth; --key takes another: ema" in result.err
    assert cli("params", "train.pth", "--key", "ema", "--json").json["totals"]["params"] == 9
    assert "no key 'emma' in train.pth" in cli("params", "train.pth", "--key", "emma", code=2).err
    cli("freeze", ".", "-m", "train.pth", "--arch", "Linear(2,3)", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    assert written["epoch"] == 3
    told = cli("freeze", ".", "-m", "train.pth", "--arch", "Linear(2,3)", "-o", "again.pth").err
    assert "(epoch, ema, optimizer) was kept" in told
    assert "was kept; --bare drops it" in told
    assert "no longer fits" not in told  # the value called optimizer is not an optimizer's state
    assert written["optimizer"] == {"lr": 0.1}
    assert torch.equal(written["model"]["weight"], state["weight"])
    cli("freeze", ".", "-m", "train.pth", "--arch", "Linear(2,3)", "-o", "bare.pth", "--bare")
    assert torch.load("bare.pth", weights_only=True).keys() == state.keys()


def test_prefixes_of_wrappers_are_stripped(cli: Cli) -> None:
    state = {f"module._orig_mod.{name}": tensor for name, tensor in nn.Linear(2, 3).state_dict().items()}
    torch.save(state, "wrapped.pth")
    result = cli("load", "wrapped.pth", "--arch", "Linear(2,3)", "--json")
    assert result.json["matched"] == 2
    assert result.json["notes"] == ["stripped 'module._orig_mod.' from every key: a wrapper had added it"]


def test_strict_and_not(cli: Cli, folder: Path) -> None:
    state = nn.Linear(2, 3).state_dict() | {"extra": torch.zeros(1)}
    del state["bias"]
    torch.save(state, "odd.pth")
    result = cli("load", "odd.pth", "--arch", "Linear(2,3)", "--json", code=1)
    assert (result.json["missing"], result.json["unexpected"]) == (["bias"], ["extra"])
    assert "--no-strict" in result.error["hint"]
    assert not (folder / "modelcli.toml").exists()
    cli("load", "odd.pth", "--arch", "Linear(2,3)", "--no-strict")
    cli("save", "out.pth")
    assert set(torch.load("out.pth", weights_only=True)) == {"weight", "bias"}
    assert modelcli.load("odd.pth", arch="Linear(2,3)", strict=False).weight.shape == (3, 2)
    with pytest.raises(AnswerNoError):
        modelcli.load("odd.pth", arch="Linear(2,3)")


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"", 4, "is empty"),
        (b"hello, world", 4, "is not a checkpoint"),
        (b"PK\x03\x04 nonsense", 4, "it is a zip file without a directory"),
    ],
)
def test_files_that_are_not_checkpoints_are_errors(
    cli: Cli, folder: Path, content: bytes, code: int, message: str
) -> None:
    (folder / "bad.pth").write_bytes(content)
    for words in (("params", "bad.pth"), ("freeze", ".", "-m", "bad.pth", "-o", "out.pth"), ("load", "bad.pth")):
        assert message in cli(*words, code=code).err
    assert not (folder / "out.pth").exists()
    with pytest.raises(FileFormatError):
        modelcli.load("bad.pth")


def test_meaningless_combinations_of_options_are_errors(cli: Cli) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), "bare.pth")
    assert "both say where the values come from" in cli("save", "o.pth", "-m", "bare.pth", "--weights", "X", code=2).err
    assert "--arch resnet18 is for checkpoints" in cli("summary", "alexnet", "--arch", "resnet18", code=2).err
    assert "--key ema is for checkpoints" in cli("summary", "alexnet", "--key", "ema", code=2).err
    assert "records no architecture" in cli("summary", "bare.pth", "--arch", "./bare.pth", code=2).err


def test_load_leaves_the_callers_generator(cli: Cli) -> None:
    cli("save", "out.pth", "-m", "Sequential(Linear(2,3),Dropout())")
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    modelcli.load("out.pth")
    assert torch.equal(torch.rand(2), expected)


def test_the_base_is_drawn_as_the_plain_constructor_draws(cli: Cli) -> None:
    cli("save", "out.pth", "-m", "squeezenet1_1", "--seed", 11)
    torch.manual_seed(11)
    plain = builders.torchvision().models.squeezenet1_1()
    written = torch.load("out.pth", weights_only=True)
    assert all(torch.equal(written[name], tensor) for name, tensor in plain.state_dict().items())


# --- files that hold more than tensors -----------------------------------------------------------------------------


def whole() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"norm": nn.BatchNorm1d(3), "act": nn.ReLU()}))
    module[0].weight.requires_grad_(False)
    module[1].tied = module[0]
    module.register_buffer("hidden", torch.zeros(2), persistent=False)
    return module


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickled_module_is_looked_at_without_running_it(cli: Cli, wrapped: bool) -> None:
    """Its tensors have state-dict names, a warning names its classes, and torch loads none of it."""
    module = whole()
    torch.save({"model": module, "epoch": 1} if wrapped else module, "whole.pth")
    result = cli("params", "whole.pth", "--json")
    rows = {row["name"]: row for row in result.json["tensors"]}
    assert rows.keys() == module.state_dict().keys()
    assert rows["0.weight"]["trainable"] is False
    assert rows["1.tied.weight"]["tied_to"] == "0.weight"
    assert rows["1.norm.running_mean"]["kind"] == "buffer"
    assert "torch.nn.modules.linear.Linear" in result.json["foreign"]
    assert result.json["notes"][0].startswith("warning: whole.pth also holds objects of")
    assert result.err == ""
    modules = cli("modules", "whole.pth", "--json").json["modules"]
    assert {row["path"]: row["type"] for row in modules} == {
        name or ".": type(child).__name__ for name, child in module.named_modules(remove_duplicate=False)
    }


def test_editing_a_pickled_module_needs_tensors_only(cli: Cli, folder: Path) -> None:
    module = whole()
    torch.save(module, "whole.pth")
    for words in (("freeze", ".", "-m", "whole.pth", "-o", "x.pth"), ("save", "x.pth", "-m", "whole.pth")):
        error = cli(*words, code=3).err
        assert "torch.nn.modules.container.Sequential" in error
        assert "--tensors-only" in error
    assert not (folder / "x.pth").exists()
    result = cli("save", "clean.pth", "-m", "whole.pth", "--tensors-only")
    assert "dropped objects of" in result.err
    clean = torch.load("clean.pth", weights_only=True)
    assert clean.keys() == module.state_dict().keys()
    assert all(torch.equal(clean[name], tensor) for name, tensor in module.state_dict().items())
    cli("load", "whole.pth", "--tensors-only")
    assert "tensors_only = true" in (folder / "modelcli.toml").read_text()
    cli("save", "again.pth")


def test_objects_beside_a_state_dict(cli: Cli) -> None:
    state = nn.Linear(2, 3).state_dict()
    torch.save({"state_dict": state, "args": functools.partial(print, "runs")}, "train.pth")
    assert "functools" in cli("params", "train.pth").err
    cli("freeze", ".", "-m", "train.pth", code=3)
    cli("freeze", ".", "-m", "train.pth", "--tensors-only", "-o", "out.pth")
    assert torch.load("out.pth", weights_only=True).keys() == state.keys()


def test_objects_and_no_tensor(cli: Cli) -> None:
    torch.save({"args": Path("runs")}, "args.pth")
    error = cli("params", "args.pth", code=3).err
    assert "contains no state dict, but objects of pathlib" in error


def test_a_file_with_no_matching_key_is_an_error(cli: Cli, folder: Path) -> None:
    """This is an error even with --no-strict, because nothing of the file would be in the model."""
    torch.save({"other.weight": torch.zeros(2)}, "other.pth")
    error = cli("load", "other.pth", "--arch", "Linear(2,3)", "--no-strict", code=1).err
    assert "no tensor of the file has a name and shape of Linear, with or without a prefix" in error
    assert not (folder / "modelcli.toml").exists()


def test_writing_after_a_non_strict_load_notes_the_missing_keys(cli: Cli) -> None:
    torch.save({"weight": torch.zeros(3, 2)}, "odd.pth")
    cli("load", "odd.pth", "--arch", "Linear(2,3)", "--no-strict")
    assert "1 tensor is not in the file, and was randomly initialised" in cli("save", "out.pth").err


def test_classes_of_a_file_that_is_imported_already(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model loaded in Python is an instance of the class that the program has imported."""
    import importlib

    (folder / "mine.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    cli("save", "out.pth", "-m", "mine.py:Net(2,3)")
    monkeypatch.syspath_prepend(str(folder))
    mine = importlib.import_module("mine")
    assert isinstance(modelcli.load("out.pth", trust=True), mine.Net)
    with pytest.raises(UnsafeError, match="trust=True in Python"):
        modelcli.load("out.pth")


# --- what a file must not cause ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        "torch.utils.tensorboard.SummaryWriter(3)",
        "torch.utils.tensorboard:SummaryWriter(3)",
        "torchvision.trap:Net()",
        "trap:Net()",
        "resnet18(norm_layer=trap:Net)",
        "Sequential(trap:Net())",
        "Sequential(torch.utils.tensorboard.SummaryWriter())",
    ],
)
@pytest.mark.parametrize("where", ["reference", "edit"])
def test_a_record_imports_nothing(cli: Cli, folder: Path, reference: str, where: str) -> None:
    """It imports neither a local module with a trusted package's name, nor one that torch itself would import."""
    cli("save", "out.pth", "-m", "Sequential(Linear(2,3))", "-q")
    for name in ("trap.py", "tensorboard/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("import pathlib\npathlib.Path('sprung').touch()\n")
    from modelcli import checkpoints, writing
    from modelcli.checkpoints.record import to_text
    from modelcli.live import planning

    record = checkpoints.read(Path("out.pth")).record
    assert record is not None
    if where == "reference":
        evil = replace(record, reference=reference)
    elif "(" in reference and not reference.startswith("resnet18"):
        evil = replace(record, edits=(f"replace 0 {reference}",), numbers=(1,), edit_count=1)
    else:
        evil = replace(record, edits=("replace 0 Sequential(trap:Net())",), numbers=(1,), edit_count=1)
    plan = planning.plan(open_live(Source("out.pth")), Path("evil.pth"), "pth")
    writing.write(replace(plan, record=to_text(evil)), Path("evil.pth"), writing.WriteOptions(force=True))
    for words in (("freeze", ".", "-m", "evil.pth"), ("load", "evil.pth"), ("save", "x.pth", "-m", "evil.pth")):
        assert "--trust" in cli(*words, code=3).err
    with pytest.raises(UnsafeError):
        modelcli.load("evil.pth")
    assert not (folder / "sprung").exists()


def test_a_file_that_holds_every_tensor_downloads_nothing(cli: Cli, folder: Path) -> None:
    cache = folder / ".torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    models = builders.torchvision().models
    torch.save(models.squeezenet1_1().state_dict(), cache / models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2])
    cli("freeze", "features", "-m", "squeezenet1_1", "--weights", "DEFAULT", "-o", "sq.pth")
    for path in cache.iterdir():
        path.unlink()
    assert isinstance(modelcli.load("sq.pth"), nn.Module)
    cli("freeze", "classifier", "-m", "sq.pth", "--check", "run", "-o", "two.pth")
    assert not list(cache.iterdir())


def test_seeds(cli: Cli, folder: Path) -> None:
    """0 is a valid seed. A seed for a file with a record decides only the values of new edits."""
    (folder / "modelcli.toml").write_text('model = "Linear(2,1)"\nseed = 7\n')
    drawn = [
        cli("params", *words, "--values", "--json").json["tensors"] for words in ((), ("--seed", 0), ("--seed", 7))
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    cli("replace", "**:ReLU", "PReLU()", "-m", "Sequential(ReLU(),ReLU(),Linear(2,2))", "-o", "one.pth")
    for seed in ("", "5"):
        words = ("--seed", seed) if seed else ()
        cli("replace", "2", "Linear(2,3)", "-m", "one.pth", "-o", "two.pth", "--force", *words)
        torch.manual_seed(int(seed or 0) * 1_000_003 + 2)  # the second edit, though the first had two matches
        assert torch.equal(torch.load("two.pth", weights_only=True)["2.weight"], nn.Linear(2, 3).weight)


def test_tied_buffers_stay_one(cli: Cli, folder: Path) -> None:
    (folder / "shared.py").write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)\n"
        "        table = torch.ones(4)\n        self.a.register_buffer('t', table)\n"
        "        self.b.register_buffer('t', table)\n"
    )
    cli("freeze", "a", "-m", "shared.py:Net", "-o", "one.pth")
    cli("freeze", "b", "-m", "one.pth", "--trust", "-o", "two.pth")
    for name in ("one.pth", "two.pth"):
        assert cli("params", name, "--json").json["totals"]["buffers"] == 4
        model = modelcli.load(name, trust=True)
        assert model.a.t is model.b.t


def test_output_printed_by_forward_is_kept_apart_from_data(cli: Cli, folder: Path) -> None:
    (folder / "loud.py").write_text(
        "from torch import nn\nclass M(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 2)\n"
        "    def forward(self, x):\n        print('forward')\n        return super().forward(x)\n"
    )
    assert cli("summary", "loud.py:M", "--input-size", "1,2", "--json").json["layers"][0]["output_shape"] == [1, 2]


@pytest.mark.parametrize(
    "body",
    [
        "self.lin = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))",
        "self.lin = nn.Linear(2, 2); self.lock = __import__('threading').Lock()",
        "self.lin = nn.Linear(2, 2); self.twice = self.lin.weight * 2",
        "self.lin = nn.Linear(2, 2); self.scripted = torch.jit.script(nn.ReLU())",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_models_that_cannot_be_copied(cli: Cli, folder: Path, body: str) -> None:
    (folder / "own.py").write_text(
        "import torch\nfrom torch import nn\nclass M(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        {body}\n    def forward(self, x):\n        return self.lin(x)\n"
    )
    layers = cli("summary", "own.py:M", "--input-size", "1,2", "--json").json["layers"]
    assert layers[0]["output_shape"] == [1, 2]
    cli("freeze", "lin", "-m", "own.py:M", "--input-size", "1,2", "-o", "out.pth")


def test_a_record_in_a_linked_folder(cli: Cli, folder: Path) -> None:
    (folder / "elsewhere" / "deep").mkdir(parents=True)
    (folder / "runs").symlink_to(folder / "elsewhere" / "deep")
    cli("save", "runs/out.pth", "-m", "nets.py:Net")
    assert modelcli.load("runs/out.pth", trust=True).conv1.out_channels == 3


def test_safetensors_metadata_is_not_module_metadata(cli: Cli, folder: Path) -> None:
    """The metadata entry `format` is not the version of a module called format."""
    from safetensors.torch import save_file

    (folder / "fm.py").write_text(
        "from torch import nn\nclass F(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.format = nn.BatchNorm1d(2)\n"
    )
    state = {f"format.{name}": tensor for name, tensor in nn.BatchNorm1d(2).state_dict().items()}
    save_file(state, "f.safetensors", metadata={"format": "pt"})
    cli("save", "out.pth", "-m", "f.safetensors", "--arch", "fm.py:F")
    cli("save", "bare.pth", "-m", "f.safetensors")
    own = nn.Sequential()
    own.format = nn.BatchNorm1d(2)
    own.load_state_dict(torch.load("bare.pth", weights_only=True))
    assert "--key x is for training checkpoints" in cli("params", "f.safetensors", "--key", "x", code=2).err


NOISE = """
import torch
from torch import nn

class Noise(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.register_buffer("noise", torch.randn(size), persistent=False)

    def forward(self, x):
        return x + self.noise
"""


def test_values_that_no_file_has_are_drawn_again_equally(folder: Path) -> None:
    """An edit of many matches is many lines of a record, and one that changes nothing is none: numbers stay."""
    (folder / "own.py").write_text(NOISE)
    live = open_live(Source("Sequential(ReLU(),Linear(4,4),ReLU(),Dropout())"))
    for line in ("replace **:ReLU GELU()", "cast . float32", "replace 3 own:Noise(4)", "replace 1 Linear(4,4)"):
        live.apply([edits.parse(line)])
    plan = planning.plan(live, folder / "out.pth", "pth")
    writing.write(plan, folder / "out.pth", WriteOptions())
    loaded = modelcli.load(folder / "out.pth", trust=True)
    torch.manual_seed(3)
    assert torch.equal(loaded[3].noise, torch.randn(4))
    again = open_live(Source(str(folder / "out.pth"), trust=True))
    assert torch.equal(real_tensor(again.module[3].noise), loaded[3].noise)
    again.apply([edits.parse("init 1 normal --bias normal")])
    torch.manual_seed(5)
    assert torch.equal(real_tensor(again.module[1].weight), torch.randn(4, 4))


def test_classes_of_torchvisions_models_are_installed_ones(cli: Cli, folder: Path) -> None:
    predictor = "torchvision.models.detection.faster_rcnn:FastRCNNPredictor"
    words = ("-m", "fasterrcnn_resnet50_fpn", "--weights", "none")
    for name in ("FastRCNNPredictor", predictor):
        cli("replace", "roi_heads.box_predictor", f"{name}(1024,3)", *words, "-o", "out.pth", "--force")
        assert modelcli.load(folder / "out.pth").roi_heads.box_predictor.cls_score.out_features == 3
    script = cli("script", "-e", f"replace roi_heads.box_predictor {predictor}(1024,3)", *words).out
    assert "torchvision.models.detection.faster_rcnn.FastRCNNPredictor(1024, 3)" in script


def test_weights_of_another_size_say_what_to_do(cli: Cli) -> None:
    error = cli("load", "resnet18(num_classes=37)", "--weights", "DEFAULT", code=2).err
    assert "IMAGENET1K_V1 fits resnet18 as it is: -m resnet18 --weights IMAGENET1K_V1" in " ".join(error.split())
