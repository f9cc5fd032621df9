"""A record in a file says what its tensors do not: what is believed, what is built, and what that may cost."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import modelcli
from modelcli import checkpoints, references, writing
from modelcli.checkpoints import limits
from modelcli.errors import FileFormatError, RequestError, UnsafeError
from modelcli.live import planning, zoo
from modelcli.live.opening import open_live
from modelcli.record import Record, to_text
from modelcli.references import CheckpointFile, Installed, Source
from tests.conftest import Cli

RESNET = "torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock,[100000000,1,1,1])"
SWIN = "torchvision.models.swin_transformer.SwinTransformer"
BASE = "Sequential(Linear(2,3),ReLU(),Linear(3,2))"


def record_of(path: str) -> Record:
    record = checkpoints.read(Path(path)).record
    assert record is not None
    return record


def forge(source: str, out: str, **changes: Any) -> Record:
    """The tensors of a file that modelcli wrote, with another record; gives the honest one."""
    record = record_of(source)
    plan = planning.plan(open_live(Source(source)), Path(out), "pth")
    writing.write(replace(plan, record=to_text(replace(record, **changes))), Path(out), writing.Care(force=True))
    return record


# --- what building may cost ----------------------------------------------------------------------------------------

#: References that a few bytes write, and that nothing could build.
ENDLESS = {
    "blocks of a class": RESNET,
    "blocks of a builder": "mobilenet_v2(inverted_residual_setting=[[6,160,100000000,2]])",
    "blocks inside a module": f"Sequential(Linear(2,3),{RESNET})",
    "stages": f"{SWIN}([4,4],96,[1000000000],[3],[7,7])",
    "copies": "Transformer(d_model=8,nhead=8,num_encoder_layers=1999)",
}


@pytest.mark.parametrize("reference", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_recorded_constructor_that_does_not_end(cli: Cli, reference: str) -> None:
    cli("save", "one.pth", "-m", BASE, "-q")
    forge("one.pth", "evil.pth", reference=reference)
    zoo.torchvision()
    started = time.process_time()
    error = cli("freeze", ".", "-m", "evil.pth", code=4).err
    assert time.process_time() - started < 5
    assert "takes more than 2,008 modules to build" in error
    assert "MODELCLI_MAX_MODULES" in error


def test_an_edit_in_a_record_that_does_not_end(cli: Cli) -> None:
    cli("save", "one.pth", "-m", BASE, "-q")
    forge("one.pth", "evil.pth", edits=(f"replace 1 {RESNET}",), numbers=(1,), edit_count=1)
    with pytest.raises(FileFormatError, match="more than 2,008 modules"):
        modelcli.load("evil.pth")


@pytest.mark.parametrize("words", [("modules", RESNET), ("replace", "1", RESNET, "-m", BASE)])
def test_a_typed_constructor_that_does_not_end(
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
    """Where the meta device alone does not do, a table of a window of 200 x 200 takes 25 GB."""
    from modelcli.live import modules, twins

    def no_meta(_construct: Any) -> Any:
        raise modules.ConstructorError("", NotImplementedError("meta"), None)

    cli("save", "one.pth", "-m", BASE, "-q")
    forge("one.pth", "evil.pth", reference=f"{SWIN}([4,4],96,[2],[3],[200,200])")
    monkeypatch.setattr(twins, "_under_meta", no_meta)
    assert "MB beside its parameters to build" in cli("freeze", ".", "-m", "evil.pth", code=4).err


def test_a_loop_that_makes_no_modules(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch ends it where it stands; nothing of it is left for what runs next."""
    from modelcli.live import bounds

    def loop() -> None:
        while True:
            pass

    short = replace(bounds.as_typed("Loop()"), seconds=0.1)
    with pytest.raises(RequestError, match=r"Loop\(\) takes more than 0 s to build"), bounds.held(short):
        loop()
    with bounds.held(short):
        pass
    deadline = time.process_time() + 0.3
    while time.process_time() < deadline:
        pass


def test_a_record_asks_for_no_more_memory_than_its_file_warrants(cli: Cli) -> None:
    """The module is taken out again, so that the tensors fit; to load the file would make 10 GB of it before."""
    cli("save", "one.pth", "-m", BASE, "-q")
    large = "Sequential(Linear(50000,50000),Linear(2,3),ReLU(),Linear(3,2))"
    forge("one.pth", "evil.pth", reference=large, edits=("remove 0",), numbers=(1,), edit_count=1)
    with pytest.raises(FileFormatError, match=r"takes 10,000 MB, far more than evil\.pth holds"):
        modelcli.load("evil.pth")
    forge("one.pth", "evil.pth", edits=("insert 0 Linear(50000,50000)", "remove 0"), numbers=(1, 2), edit_count=2)
    with pytest.raises(FileFormatError, match=r"far more than evil\.pth holds"):
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
def test_no_path_in_a_record_is_looked_at(cli: Cli, reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_class_of_torchvisions_is_an_installed_one_by_either_spelling(cli: Cli) -> None:
    texts = ("torchvision.ops:MLP(4,[4,4])", "torchvision.ops.MLP(4,[4,4])")
    assert len({str(references.parse(text)) for text in texts}) == 1
    assert all(isinstance(references.parse(text), Installed) for text in texts)
    for text in texts:
        cli("save", "mlp.pth", "-m", text, "-q", "--force")
        assert type(modelcli.load("mlp.pth")) is zoo.torchvision().ops.MLP  # without trust
    assert isinstance(references.parse("torch.nn:Linear(2,3)"), Installed)
    assert not isinstance(references.parse("torchvision.models:resnet18"), Installed | CheckpointFile)  # a function
