"""How far a record in a file is trusted: which claims are used, what is built, and at what cost."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import modelcli
from modelcli import checkpoints, resolve, writing
from modelcli.checkpoints import limits
from modelcli.checkpoints.record import Record, to_text
from modelcli.commands.editable import open_editable
from modelcli.errors import FileFormatError, RequestError, UnsafeError
from modelcli.language.references import CheckpointFile, NamedModel, Source
from modelcli.live.providers import torchvision as builders
from modelcli.model.blueprint import LayerTrace, ModuleInfo
from tests.conftest import Cli

RESNET = "torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock,[100000000,1,1,1])"
SWIN = "torchvision.models.swin_transformer.SwinTransformer"
BASE = "Sequential(Linear(2,3),ReLU(),Linear(3,2))"


def record_of(path: str) -> Record:
    record = checkpoints.read(Path(path)).record
    assert record is not None
    return record


def forge(source: str, out: str, **changes: Any) -> Record:
    """Copy a file that modelcli wrote with changes to its record. Returns the original record."""
    record = record_of(source)
    plan = open_editable(Source(source)).plan(Path(out), "pth")
    writing.write(
        replace(plan, record=to_text(replace(record, **changes))), Path(out), writing.WriteOptions(force=True)
    )
    return record


# --- what building may cost ----------------------------------------------------------------------------------------

#: Short references to models that are too large to build.
ENDLESS = {
    "blocks of a class": RESNET,
    "blocks of a builder": "mobilenet_v2(inverted_residual_setting=[[6,160,100000000,2]])",
    "blocks inside a module": f"Sequential(Linear(2,3),{RESNET})",
    "stages": f"{SWIN}([4,4],96,[1000000000],[3],[7,7])",
    "copies": "Transformer(d_model=8,nhead=8,num_encoder_layers=1999)",
}


@pytest.mark.parametrize("reference", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_recorded_constructor_that_never_ends_is_an_error(cli: Cli, reference: str) -> None:
    cli("save", "one.pth", "-m", BASE, "-q")
    forge("one.pth", "evil.pth", reference=reference)
    builders.torchvision()
    started = time.process_time()
    error = cli("freeze", ".", "-m", "evil.pth", code=4).err
    assert time.process_time() - started < 5
    assert "takes more than 2,008 modules to build" in error
    assert "MODELCLI_MAX_MODULES" in error


def test_a_recorded_edit_that_never_ends_is_an_error(cli: Cli) -> None:
    cli("save", "one.pth", "-m", BASE, "-q")
    forge("one.pth", "evil.pth", edits=(f"replace 1 {RESNET}",), numbers=(1,), edit_count=1)
    with pytest.raises(FileFormatError, match="more than 2,008 modules"):
        modelcli.load("evil.pth")


@pytest.mark.parametrize("words", [("modules", RESNET), ("replace", "1", RESNET, "-m", BASE)])
def test_a_typed_constructor_that_never_ends_is_an_error(
    cli: Cli, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limits.MODULES.value == 20_000
    monkeypatch.setenv("MODELCLI_MAX_MODULES", "2000")  # which takes a tenth of the time
    error = cli(*words, code=2).err
    assert "takes more than 2,000 modules to build" in error
    assert "check the counts in its arguments" in error


def test_the_limit_on_modules_can_be_raised(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCLI_MAX_MODULES", "10")
    assert "more than 10 modules" in cli("modules", "resnet18", "--no-cache", code=2).err
    monkeypatch.setenv("MODELCLI_MAX_MODULES", "100")
    cli("modules", "resnet18", "--no-cache")


def test_tensors_that_a_recorded_constructor_makes_on_its_way(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the meta device, the table of a 200 x 200 window takes 25 GB."""
    from modelcli.live import meta_models, modules

    def no_meta(_construct: Any) -> Any:
        raise modules.ConstructorError("", NotImplementedError("meta"), None)

    cli("save", "one.pth", "-m", BASE, "-q")
    forge("one.pth", "evil.pth", reference=f"{SWIN}([4,4],96,[2],[3],[200,200])")
    monkeypatch.setattr(meta_models, "_under_meta", no_meta)
    assert "MB beside its parameters to build" in cli("freeze", ".", "-m", "evil.pth", code=4).err


def test_an_endless_loop_without_modules_is_an_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watching thread ends the loop, and no exception remains pending for later code."""
    from modelcli.live import bounds

    def loop() -> None:
        while True:
            pass

    short = replace(bounds.as_typed("Loop()"), seconds=0.1)
    with pytest.raises(RequestError, match=r"Loop\(\) takes more than 0 s to build"), bounds.enforced(short):
        loop()
    with bounds.enforced(short):
        pass
    deadline = time.process_time() + 0.3
    while time.process_time() < deadline:
        pass


def test_a_record_asks_for_no_more_memory_than_its_file_warrants(cli: Cli) -> None:
    """An edit removes the module again, so that the tensors fit, but loading would allocate 10 GB before that."""
    cli("save", "one.pth", "-m", BASE, "-q")
    large = "Sequential(Linear(50000,50000),Linear(2,3),ReLU(),Linear(3,2))"
    forge("one.pth", "evil.pth", reference=large, edits=("remove 0",), numbers=(1,), edit_count=1)
    with pytest.raises(FileFormatError, match=r"needs 10,000 MB, far more than evil\.pth contains"):
        modelcli.load("evil.pth")
    forge("one.pth", "evil.pth", edits=("insert 0 Linear(50000,50000)", "remove 0"), numbers=(1, 2), edit_count=2)
    with pytest.raises(FileFormatError, match=r"far more than evil\.pth contains"):
        modelcli.load("evil.pth")


# --- the paths and names in it -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        "//host/share/x.pth",
        "\\\\host\\share\\x.pth",
        "//host/share/nets.py:Net",
        "\\\\host\\share\\nets.py:Net",
        "/etc/nets.py:Net",
        "C:/nets.py:Net",
        "C:nets.py:Net",
        "../../x.safetensors",
        "../../nets.py:Net",
        "nets.py:Net",
        "~/x/",
    ],
)
def test_no_path_in_a_record_is_accessed(cli: Cli, reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("save", "one.pth", "-m", BASE, "-q")
    forge("one.pth", "evil.pth", reference=reference)
    touched: list[str] = []
    plain_stat, plain_open, plain_list = os.stat, os.open, os.listdir

    def watched(function: Any) -> Any:
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            touched.append(str(path))
            return function(path, *args, **kwargs)

        return call

    for name, function in (("stat", plain_stat), ("open", plain_open), ("listdir", plain_list)):
        monkeypatch.setattr(os, name, watched(function))
    for words in (("freeze", ".", "-m", "evil.pth"), ("summary", "evil.pth"), ("check", "evil.pth", "--frozen", ".")):
        cli(*words, code=3 if words[0] == "freeze" else 1 if words[0] == "check" else 0)
    with pytest.raises(UnsafeError):
        modelcli.load("evil.pth")
    monkeypatch.undo()
    names = ("host", "x.pth", "x.safetensors", "nets.py", "~")
    assert not [path for path in touched if any(name in path for name in names)]


def test_trust_does_not_lead_to_another_machine(cli: Cli) -> None:
    cli("save", "one.pth", "-m", BASE, "-q")
    for reference in ("//host/share/nets.py:Net", "C:\\nets.py:Net"):
        forge("one.pth", "evil.pth", reference=reference)
        assert "may not name code outside its folder" in cli("freeze", ".", "-m", "evil.pth", "--trust", code=3).err


def test_both_spellings_of_a_torchvision_class_need_no_trust(cli: Cli) -> None:
    texts = ("torchvision.ops:MLP(4,[4,4])", "torchvision.ops.MLP(4,[4,4])")
    assert len({str(resolve.parse(text)) for text in texts}) == 1
    assert all(isinstance(resolve.parse(text), NamedModel) for text in texts)
    for text in texts:
        cli("save", "mlp.pth", "-m", text, "-q", "--force")
        assert type(modelcli.load("mlp.pth")) is builders.torchvision().ops.MLP  # without trust
    assert isinstance(resolve.parse("torch.nn:Linear(2,3)"), NamedModel)
    assert not isinstance(resolve.parse("torchvision.models:resnet18"), NamedModel | CheckpointFile)  # a function


# --- what a record says of the tensors -----------------------------------------------------------------------------

NET = "Sequential(Conv2d(3,8,3),BatchNorm2d(8),Flatten(),Linear(8,4),LayerNorm(4))"


def changed(record: Record, *, tensors: Any = None, modules: Any = None, layers: Any = None) -> Any:
    """Return the blueprint of a record with some tensors, modules and outputs changed, by name."""
    blueprint = record.blueprint
    assert blueprint.trace is not None
    infos = [replace(t, **(tensors or {}).get(t.name, {})) for t in blueprint.tensors]
    listed = [replace(m, **(modules or {}).get(m.path, {})) for m in blueprint.modules]
    ran = {path: replace(layer, **(layers or {}).get(path, {})) for path, layer in blueprint.trace.layers.items()}
    return replace(blueprint, tensors=tuple(infos), modules=tuple(listed), trace=replace(blueprint.trace, layers=ran))


BUFFER = {"kind": "buffer", "requires_grad": None}
#: Changes to the blueprint of a record, and what contradicts them.
FALSE: dict[str, tuple[dict[str, Any], str]] = {
    "weights are buffers": ({"tensors": {"3.weight": BUFFER}}, "3.weight as a buffer, but in a Linear it is a param"),
    "statistics are parameters": (
        {"tensors": {"1.running_mean": {"kind": "parameter", "requires_grad": True}}},
        "1.running_mean as a parameter, but in a BatchNorm2d it is a buffer",
    ),
    "a layer of other sizes": (
        {"modules": {"3": {"config": "in_features=9, out_features=4, bias=True"}}},
        "its weight has the shape [4, 8]",
    ),
    "a convolution of other sizes": (
        {"modules": {"0": {"config": "3, 8, kernel_size=(5, 5), stride=(1, 1)"}}},
        "its weight has the shape [8, 3, 3, 3]",
    ),
    "another class": ({"modules": {"3": {"type": "ReLU"}}}, "3 as a ReLU, which has no weight"),
    "a class without its tensors": (
        {"modules": {"2": {"type": "Linear", "config": "in_features=8, out_features=4, bias=True"}}},
        "but without a weight",
    ),
    "another output of a layer": (
        {"layers": {"3": {"output_shape": [1, 5]}}},
        "3 the output shape [1, 5], but a weight of shape",
    ),
    "another output of the model": (
        {"layers": {"": {"output_shape": [1, 10]}}},
        ". the output shape [1, 10], but its last layer",
    ),
    "frozen by one account": (
        {"tensors": {"3.bias": {"requires_grad": False}}},
        "lists the parameter 3.bias as frozen",
    ),
    "a module twice": ({"modules": {"1": {"path": "0"}}}, "lists each path once"),
    "a module without its holder": (
        {"modules": {"4": {"path": "9.9"}}},
        "lists the module 9.9, but not the module that contains it",
    ),
    "shared with nothing": ({"modules": {"4": {"shared_with": "7"}}}, "shares 4 with 7, which it does not list"),
    "a trained whole number": (
        {"tensors": {"1.num_batches_tracked": {"kind": "parameter", "requires_grad": True}}},
        "1.num_batches_tracked as trained, which is impossible for int64",
    ),
}


@pytest.mark.parametrize(("changes", "told"), FALSE.values(), ids=FALSE.keys())
def test_a_record_that_contradicts_its_tensors_is_ignored(cli: Cli, changes: dict[str, Any], told: str) -> None:
    """Every command ignores the whole record without building anything, and a note says why."""
    cli("save", "one.pth", "-m", NET, "--input-size", "1,3,3,3", "-q")
    assert "ignored" not in cli("summary", "one.pth").err
    record = record_of("one.pth")
    forge("one.pth", "evil.pth", blueprint=changed(record, **changes))
    for words in (("summary", "evil.pth"), ("modules", "evil.pth"), ("params", "evil.pth")):
        result = cli(*words)
        assert "the record in evil.pth was ignored: " in result.err
        assert told in " ".join(result.err.split())
    assert cli("modules", "evil.pth", "--json").json["modules"][0]["type"] is None


def test_a_frozen_name_that_is_not_a_parameter(cli: Cli) -> None:
    cli("save", "one.pth", "-m", NET, "-q")
    forge("one.pth", "evil.pth", frozen=("nothing.weight",))
    assert "it names nothing.weight as frozen" in cli("params", "evil.pth").err


@pytest.mark.parametrize("field", ["input_dtype", "seed", "edits", "schema"])
def test_a_damaged_record_is_named(cli: Cli, folder: Path, field: str) -> None:
    """Earlier versions ignored it without a note."""
    cli("save", "one.pth", "-m", BASE, "-q")
    wrong = {"input_dtype": ["nonsense"], "seed": -1, "edits": ["frezee 0"], "schema": 2}
    document = json.loads(to_text(record_of("one.pth"))) | {field: wrong[field]}
    plan = open_editable(Source("one.pth")).plan(Path("evil.pth"), "pth")
    writing.write(replace(plan, record=json.dumps(document)), Path("evil.pth"), writing.WriteOptions(force=True))
    told = {"input_dtype": "no dtype 'nonsense'", "seed": "its seed is -1", "edits": "frezee", "schema": "schema is 2"}
    error = cli("summary", "evil.pth").err
    assert "the record in evil.pth was ignored" in error
    assert told[field] in error
    for words in (("check", "evil.pth", "--frozen", "."), ("check", "evil.pth", "--has", "0:Linear")):
        cli(*words, code=1)
    (folder / "modelcli.toml").write_text('model = "Linear(2,3)"\ninput_size = "1,2"\ninput_dtype = ["nonsense"]\n')
    assert "modelcli.toml:3: no dtype 'nonsense'" in cli("summary", code=2).err


# --- assertions ----------------------------------------------------------------------------------------------------

OWN = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3)

    def forward(self, x):
        return self.fc(x)
"""


def test_assertions_are_not_answered_by_a_forged_record(cli: Cli) -> None:
    """The forged record claims whatever is asserted: a small, frozen model with that layer and that output."""
    cli("save", "one.pth", "-m", "alexnet(num_classes=7)", "-q")
    record = record_of("one.pth")
    fake = ModuleInfo("classifier.7", "Linear", ("Linear",), "in_features=7, out_features=10")
    buffers = [
        replace(t, kind="buffer", requires_grad=None) if t.name == "features.0.weight" else t
        for t in record.blueprint.tensors
    ]
    assert record.blueprint.trace is not None
    layers = dict(record.blueprint.trace.layers) | {"": LayerTrace([1, 10], 5)}
    claims = [
        ({"tensors": tuple(buffers)}, ("--max-params", "57000000")),
        ({"modules": (*record.blueprint.modules, fake)}, ("--has", "classifier.7:Linear")),
        ({"trace": replace(record.blueprint.trace, layers=layers)}, ("--output-shape", "1,10")),
        ({"modules": record.blueprint.modules[:-1]}, ("--absent", "classifier.6:Linear")),
    ]
    for changes, words in claims:
        forge("one.pth", "evil.pth", blueprint=replace(record.blueprint, **changes))
        cli("check", "evil.pth", *words, code=1)
    cli("check", "one.pth", "--max-params", "57.1M", "--has", "classifier.6:Linear", "--output-shape", "1,7", "--safe")


def test_the_built_model_decides_and_a_note_says_that_the_record_differs(cli: Cli) -> None:
    """A pooling layer instead of a ReLU has the same tensors. Only running it shows its output."""
    cli("save", "one.pth", "-m", "Sequential(Linear(4,4),ReLU())", "--input-size", "1,4", "-q")
    forge("one.pth", "evil.pth", reference="Sequential(Linear(4,4),AdaptiveAvgPool1d(2))")
    assert cli("check", "evil.pth", "--output-shape", "1,2", "--json").json["passed"]
    result = cli("check", "evil.pth", "--output-shape", "1,4", code=1)
    assert "describes another model than it names" in result.err


def test_a_reference_that_does_not_fit_the_tensors_is_ignored(cli: Cli) -> None:
    cli("save", "one.pth", "-m", "Sequential(Linear(4,4),ReLU())", "--input-size", "1,4", "-q")
    forge("one.pth", "evil.pth", reference="Sequential(Linear(4,5))")
    result = cli("check", "evil.pth", "--has", "1:ReLU", code=1)
    assert "the record in evil.pth was ignored: evil.pth does not fit" in result.err
    cli("check", "evil.pth", "--output-shape", "1,4", code=2)  # the answer is unknown


def test_safe_does_not_accept_what_only_the_record_says(cli: Cli, folder: Path) -> None:
    """The architecture is a user's code, which is not run because a file names it."""
    (folder / "own.py").write_text(OWN)
    cli("save", "one.pth", "-m", "own.py:Net", "--input-size", "1,2", "-q")
    claims = ("--frozen", "fc.bias", "--has", "fc:Linear", "--output-shape", "1,3", "--absent", "head")
    cli("freeze", "fc", "-m", "one.pth", "--trust", "-o", "two.pth", "-q")
    (folder / "own.py").write_text("raise SystemExit('ran')")
    rows = cli("check", "two.pth", *claims, "--json").json["checks"]
    assert all("names own.py:Net" in row["on_record"] for row in rows)
    assert "the record in the file says so" in cli("check", "two.pth", *claims).out
    document = cli("check", "two.pth", *claims, "--safe", "--max-params", "20", "--json", code=1).json
    failed = {row["check"] for row in document["checks"] if not row["passed"]}
    assert failed == {"frozen", "has", "output-shape", "absent"}
    (folder / "own.py").write_text(OWN)
    document = cli("check", "two.pth", *claims, "--safe", "--trust", "--json").json
    assert not any("on_record" in row for row in document["checks"])


def test_assertions_about_tensors_build_no_model(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelcli.live import opening

    cli("save", "one.pth", "-m", BASE, "-q")

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("something was built")

    monkeypatch.setattr(opening, "open_live", refuse)
    cli("check", "one.pth", "--max-params", "17", "--has", "0.weight", "--has", "2", "--dtype", "float32", "--safe")
