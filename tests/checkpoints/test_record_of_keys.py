"""Records of state-dict models omit what follows from the keys of their file, and restore the whole blueprint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modelcli import checkpoints
from modelcli.checkpoints import record as records
from modelcli.checkpoints import record_of_keys
from modelcli.checkpoints.record import Record, RecordOfKeys, to_text
from modelcli.model.blueprint import Blueprint, from_keys
from modelcli.model.tensors import TensorInfo
from tests.conftest import Cli

KEYS = ("a.x.weight", "a.x.bias", "a.y.weight", "b.weight", "b.running_mean", "top")


def state_dict(names: Sequence[str] = KEYS) -> dict[str, torch.Tensor]:
    return {name: torch.full((2,), float(number)) for number, name in enumerate(names)}


def document_in(path: str) -> dict[str, object]:
    """Return the record as JSON values, read by safetensors or torch."""
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["modelcli"])
    return json.loads(torch.load(path, weights_only=True)._metadata[".modelcli"])


def requires_grad_in(path: str) -> dict[str, bool | None]:
    record = checkpoints.read(Path(path)).record
    assert record is not None
    return {info.name: info.requires_grad for info in record.blueprint.tensors if info.kind == "parameter"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("edits", "flags"),
    [
        (("remove a.y",), {}),
        (("freeze a",), {"a": False}),
        (("freeze .",), {"": False}),
        (
            ("unfreeze .", "freeze a.x.bias"),
            {"a.x.weight": True, "a.x.bias": False, "a.y": True, "b": True, "top": True},
        ),
    ],
)
def test_the_keys_are_written_once(cli: Cli, suffix: str, edits: Sequence[str], flags: dict[str, bool]) -> None:
    """requires_grad is stored by module, and reads as a record with the whole blueprint does."""
    torch.save(state_dict(), "in.pth")
    out = f"out{suffix}"
    cli("apply", *(word for edit in edits for word in ("-e", edit)), "-m", "in.pth", "-o", out)
    document = document_in(out)
    assert "blueprint" not in document
    assert "frozen" not in document
    assert document["keys"]["requires_grad"] == flags
    assert document["edits"] == list(edits)
    record = checkpoints.read(Path(out)).record
    assert record is not None
    assert not isinstance(record, RecordOfKeys)
    assert record.frozen == tuple(name for name, flag in requires_grad_in(out).items() if flag is False)
    # A file with the whole blueprint, as modelcli wrote it before, shows the same.
    shown = [cli("params", out, "--json").json, cli("summary", out, "--json").json]
    whole = f"whole{suffix}"
    if suffix == ".pth":
        state = torch.load(out, weights_only=True)
        state._metadata[".modelcli"] = to_text(record)
        torch.save(state, whole)
    else:
        save_file(load_file(out), whole, {"modelcli": to_text(record)})
    assert checkpoints.read(Path(whole)).record == record
    for words, before in zip((("params",), ("summary",)), shown, strict=True):
        after = cli(*words, whole, "--json").json
        assert {key: value for key, value in after.items() if key not in ("model", "notes")} == {
            key: value for key, value in before.items() if key not in ("model", "notes")
        }


def test_edits_are_appended_to_the_recorded_edits(cli: Cli) -> None:
    torch.save(state_dict(), "in.pth")
    cli("freeze", "a", "-m", "in.pth", "-o", "one.safetensors")
    cli("rename", "a.**", "c.**", "-m", "one.safetensors", "-o", "two.pth")
    assert document_in("two.pth")["edits"] == ["freeze a", "rename a.** c.**"]
    assert document_in("two.pth")["keys"]["requires_grad"] == {"c": False}
    assert requires_grad_in("two.pth") == {
        "c.x.weight": False,
        "c.x.bias": False,
        "c.y.weight": False,
        "b.weight": None,
        "top": None,
    }


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("rename", "b.running_mean", "b.mean"), "a buffer by another name than such have"),
        (("replace", "b", "Linear(2,2)"), "a module of a known type"),
    ],
)
def test_a_blueprint_that_keys_do_not_determine_is_written_out(cli: Cli, words: Sequence[str], what: str) -> None:
    torch.save(state_dict(), "in.pth")
    cli(*words, "-m", "in.pth", "-o", "out.pth")
    assert "blueprint" in document_in("out.pth"), what


def test_tied_tensors_are_written_out(cli: Cli) -> None:
    weight = torch.ones(2)
    torch.save({"a.weight": weight, "b.weight": weight, "c.weight": torch.ones(3)}, "in.pth")
    cli("freeze", "c", "-m", "in.pth", "-o", "out.safetensors")
    assert "blueprint" in document_in("out.safetensors")
    assert set(requires_grad_in("out.safetensors")) == {"a.weight", "b.weight", "c.weight"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (state_dict(KEYS[1:]), "the file holds 5 tensors, and it is about 6"),
        (state_dict((*KEYS[1:], "new")), "the names, shapes or dtypes of the tensors in the file are not those"),
        ({name: value[:1] for name, value in state_dict().items()}, "the names, shapes or dtypes of the tensors"),
        ({name: value.double() for name, value in state_dict().items()}, "the names, shapes or dtypes of the tensors"),
    ],
)
def test_a_record_of_other_tensors_is_ignored(cli: Cli, changed: dict[str, torch.Tensor], words: str) -> None:
    torch.save(state_dict(), "in.pth")
    cli("freeze", "a", "-m", "in.pth", "-o", "out.safetensors")
    with safe_open("out.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(changed, "changed.safetensors", metadata)
    notes = cli("params", "changed.safetensors", "--json").json["notes"]
    assert any(note.startswith("the record in changed.safetensors was ignored: ") and words in note for note in notes)
    assert checkpoints.read(Path("changed.safetensors")).record is None


@pytest.mark.parametrize(
    "keys",
    [
        *(None, [], 3, {}),
        {"tensors": -1, "checksum": 0, "requires_grad": {}},
        {"tensors": True, "checksum": 0, "requires_grad": {}},
        {"tensors": 1, "checksum": "0", "requires_grad": {}},
        {"tensors": 1, "checksum": 0, "requires_grad": ["a"]},
        {"tensors": 1, "checksum": 0, "requires_grad": {"a": 1}},
        {"tensors": 1, "checksum": 0},
    ],
)
def test_a_record_of_another_form_is_ignored(keys: object) -> None:
    record = Record(None, None, 0, (), (), Blueprint(from_keys([]).modules, ()))
    document = json.loads(to_text(record))
    assert records.from_text(json.dumps(document | {"keys": record_of_keys.keys_of(record.blueprint).to_json()}))
    assert records.from_text(json.dumps(document | {"keys": keys})) is None
    named = document | {"reference": "alexnet", "keys": record_of_keys.keys_of(record.blueprint).to_json()}
    assert records.from_text(json.dumps(named)) is None


names = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join)
infos = st.builds(
    TensorInfo,
    names,
    st.just((2,)),
    st.sampled_from(["float32", "int64"]),
    st.sampled_from(["parameter", "buffer"]),
    st.sampled_from([None, False, True]),
)


@given(st.lists(infos, max_size=12, unique_by=lambda info: info.name))
@settings(deadline=None)
def test_a_record_restores_the_whole_blueprint(tensors: list[TensorInfo]) -> None:
    """This holds for any flags and kinds of tensors."""
    blueprint = replace(from_keys(tensors), trace=record_of_keys.NO_TRACE)
    frozen = tuple(info.name for info in blueprint.tensors if info.requires_grad is False)
    record = Record(None, None, 0, (), frozen, blueprint)
    found = records.read(records.to_text_beside(record, [info.name for info in tensors]))
    if isinstance(found, RecordOfKeys):
        in_file = {info.name: TensorInfo(info.name, info.shape, info.dtype) for info in tensors}
        in_file |= {name: replace(info, kind="buffer") for name, info in in_file.items() if info.dtype == "int64"}
        found = found.beside(in_file, lambda _characters: None)
    assert found == record


@given(st.lists(infos, max_size=12, unique_by=lambda info: info.name), st.sampled_from([None, False, True]))
@settings(deadline=None)
def test_the_blueprint_of_an_unchanged_file_is_not_written_out(tensors: list[TensorInfo], flag: bool | None) -> None:
    """The keys describe a model completely if it was only read, and frozen as a whole or in parts."""
    in_file = [TensorInfo(f"{info.name}.w", info.shape, info.dtype) for info in tensors]  # no tensor is a module too
    in_file = [replace(info, kind="buffer") if info.dtype == "int64" else info for info in in_file]
    flags = {} if flag is None else {"": flag, "a": not flag, "a.b": flag}
    blueprint = record_of_keys.KeysOfFile(0, 0, flags).blueprint(in_file)
    found = records.read(
        records.to_text_beside(Record(None, None, 0, (), (), blueprint), [info.name for info in in_file])
    )
    assert isinstance(found, RecordOfKeys)
    assert found.keys.blueprint(in_file) == blueprint
