"""Limits on files: each is enforced, is named with its variable in the error, and can be changed by the variable."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modelcli import checkpoints
from modelcli.checkpoints import limits
from modelcli.errors import FileFormatError, RequestError


def a_pth(folder: Path) -> Path:
    path = folder / "m.pth"
    torch.save({"a": torch.ones(3), "b": torch.ones(3)}, path)
    return path


def a_safetensors(folder: Path) -> Path:
    save_file({"a": torch.ones(3)}, folder / "m.safetensors")
    return folder / "m.safetensors"


def an_index(folder: Path) -> Path:
    a_safetensors(folder)
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "m.safetensors"}}))
    return path


def a_plain_pickle(folder: Path) -> Path:
    path = folder / "m.pkl"
    path.write_bytes(pickle.dumps({"a": torch.ones(3)}))
    return path


def nested(folder: Path, levels: int = 30) -> Path:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    path = folder / "nested.pth"
    with limits.room_for_nesting():  # the pickler of Python recurses
        torch.save({"state_dict": {"a": torch.ones(3)}, "deep": value}, path)
    return path


def nested_module(folder: Path) -> Path:
    """Write a pickled module with nested modules."""
    module: nn.Module = nn.Linear(1, 1)
    for _ in range(12):
        module = nn.Sequential(module)
    path = folder / "module.pth"
    torch.save(module, path)
    return path


def a_wide(folder: Path) -> Path:
    path = folder / "wide.pth"
    torch.save({"a": torch.ones((1,) * 5)}, path)
    return path


def a_shared_module(folder: Path) -> Path:
    """Write one module under 2,000 paths, each of which gives its tensors more names."""
    path = folder / "shared.pth"
    torch.save(nn.Sequential(*[nn.Linear(1, 1)] * 2000), path)
    return path


@pytest.mark.parametrize(
    ("limit", "make", "few"),
    [
        (limits.PICKLE_BYTES, a_pth, 50),
        (limits.WHOLE_PICKLE_BYTES, a_plain_pickle, 50),
        (limits.OPCODES, a_pth, 20),
        (limits.NODES, a_pth, 10),
        (limits.NESTING, nested, 20),
        (limits.NESTING, nested_module, 10),
        (limits.NAME_BYTES, a_pth, 5),
        (limits.DIMENSIONS, a_wide, 4),
        (limits.EXPANSION, a_shared_module, 10),
        (limits.ZIP_ENTRIES, a_pth, 3),
        (limits.HEADER_BYTES, a_safetensors, 20),
        (limits.INDEX_BYTES, an_index, 10),
    ],
    ids=lambda value: getattr(value, "variable", getattr(value, "__name__", value)),
)
def test_each_limit_holds_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: limits.Limit, make: Any, few: int
) -> None:
    path = make(tmp_path)
    assert checkpoints.read(path).tensors
    monkeypatch.setenv(limit.variable, str(few))
    with pytest.raises(FileFormatError, match=f"the limit is {few}") as caught:
        checkpoints.read(path)
    assert limit.variable in str(caught.value.hint)
    monkeypatch.setenv(limit.variable, str(limit.default * 2))
    assert checkpoints.read(path).tensors


@pytest.mark.parametrize("limit", limits.ALL, ids=lambda limit: limit.variable)
@pytest.mark.parametrize("text", ["many", "0", "-1", "1.5", str(2**63)])
def test_a_limit_variable_that_is_not_a_number_is_an_error(
    monkeypatch: pytest.MonkeyPatch, limit: limits.Limit, text: str
) -> None:
    monkeypatch.setenv(limit.variable, text)
    with pytest.raises(RequestError, match="a whole number above 0"):
        limit.check(1, "a file")


def test_the_defaults_are_those_that_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "safety.md").read_text(encoding="utf-8")
    for limit in limits.ALL:
        assert f"| `{limit.variable}` | {limit.default:,} " in page


@pytest.mark.parametrize("levels", [300, 990])
def test_values_nested_below_the_limit_are_read_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: int
) -> None:
    from modelcli.cli import main

    path = nested(tmp_path, levels)
    monkeypatch.chdir(tmp_path)
    assert main(["freeze", "a", "-m", str(path), "-o", "out.pth"]) == 0
    with limits.room_for_nesting():
        value = torch.load("out.pth", weights_only=True)["deep"]
    for _ in range(levels):
        (value,) = value
    assert value == 1


def test_values_nested_deeper_than_the_limit_are_refused(tmp_path: Path) -> None:
    """This holds for any depth, because the reader does not recurse."""
    deep = b"\x80\x02}(X\x01\x00\x00\x00a" + b"]" * 100_000 + b"a" * 99_999 + b"u."
    from modelcli.checkpoints.torch_pickle import pickles, trees

    read = pickles.read(deep, "made")
    with pytest.raises(FileFormatError, match="more than 1,000 levels"):
        trees.contents_of(Path("made"), read, None)
