"""Folders of shards in Hugging Face's layout: an index and the files that it names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import modelcli
from modelcli import checkpoints
from modelcli.checkpoints import strict_json
from modelcli.errors import FileFormatError, RequestError
from tests.conftest import Cli

STATE = {"0.weight": torch.arange(6.0).reshape(3, 2), "0.bias": torch.ones(3), "1.weight": torch.full((4, 3), 2.0)}
SHARDS = {"0.weight": 1, "0.bias": 1, "1.weight": 2}


def sharded(folder: Path, suffix: str = "safetensors", **changes: Any) -> Path:
    """Create a folder of two shards and their index. `changes` replaces the files of keys in the index."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number in (1, 2):
        tensors = {name: STATE[name] for name in STATE if SHARDS[name] == number}
        file = f"model-{number:05}-of-00002.{suffix}"
        save_file(tensors, folder / file) if suffix == "safetensors" else torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 84}, "weight_map": weight_map | changes}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_and_its_index_are_one_checkpoint(cli: Cli, folder: Path, suffix: str) -> None:
    shards = sharded(folder / "big", suffix)
    for reference in ("big/", "./big", f"big/model.{suffix}.index.json"):
        result = cli("params", reference, "--values", "--json")
        rows = {row["name"]: row["values"] for row in result.json["tensors"]}
        assert rows == {name: tensor.tolist() for name, tensor in STATE.items()}
        assert "3 tensors in 2 shards" in result.json["notes"][0]
    model = modelcli.load(shards, arch="Sequential(Linear(2,3),Linear(3,4,bias=False))")
    assert torch.equal(model[1].weight, STATE["1.weight"])
    cli("save", "one.pth", "-m", "big/")
    written = torch.load("one.pth", weights_only=True)
    assert all(torch.equal(written[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "C:\\x.safetensors", "a\\..\\..\\x.safetensors", "", "x\0y"]
)
def test_paths_stay_inside_the_folder(folder: Path, file: str) -> None:
    save_file({"0.bias": torch.ones(3)}, folder / "outside.safetensors")
    with pytest.raises(FileFormatError, match="outside its folder"):
        checkpoints.read(sharded(folder / "big", **{"0.bias": file}))


def test_links_out_of_the_folder_are_refused(folder: Path) -> None:
    save_file({"0.bias": torch.ones(3)}, folder / "outside.safetensors")
    shards = sharded(folder / "big", **{"0.bias": "link.safetensors"})
    (shards / "link.safetensors").symlink_to(folder / "outside.safetensors")
    with pytest.raises(FileFormatError, match="a link to a file outside its folder"):
        checkpoints.read(shards)


def test_a_cache_of_downloads_links_the_index_and_its_shards_to_one_other_folder(folder: Path) -> None:
    """In huggingface_hub's cache, snapshots/<commit>/<name> are links to blobs/<digest>."""
    real = sharded(folder / "blobs")
    snapshot = folder / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert checkpoints.read(snapshot).infos().keys() == STATE.keys()
    (folder / "outside").symlink_to(real)  # a link to a link that ends in the right place
    assert checkpoints.read(folder / "outside").infos().keys() == STATE.keys()


def test_an_index_that_names_an_index_or_a_folder(folder: Path) -> None:
    """An index may name itself; nothing is read in a cycle."""
    shards = sharded(folder / "big", **{"0.bias": "model.safetensors.index.json"})
    with pytest.raises(FileFormatError, match="a JSON file"):
        checkpoints.read(shards)
    shards = sharded(folder / "other", **{"0.bias": "."})
    with pytest.raises(FileFormatError, match="does not exist"):
        checkpoints.read(shards)


def test_one_shard_spelt_in_two_ways_is_read_once(folder: Path) -> None:
    plain = checkpoints.read(sharded(folder / "plain"))
    names = {file.name for file in (folder / "plain").iterdir() if file.suffix != ".json"}
    index = next((folder / "plain").glob("*.index.json"))
    document = json.loads(index.read_text())
    first = next(iter(document["weight_map"]))
    document["weight_map"][first] = f"./././{document['weight_map'][first]}"
    index.write_text(json.dumps(document))
    again = checkpoints.read(folder / "plain")
    assert again.infos() == plain.infos()
    assert f"in {len(names)} shards" in again.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a valid index of shards"),
        ("[]", "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "the name 'a' twice"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "which does not exist"),
        ("{", "not a valid index of shards"),
        ("[" * 100_000, "not a valid index of shards"),
    ],
)
def test_damaged_indexes(folder: Path, text: str, message: str) -> None:
    (folder / "big").mkdir()
    (folder / "big" / "model.index.json").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        checkpoints.read(folder / "big")


def test_an_index_that_does_not_fit_its_shards(folder: Path) -> None:
    with pytest.raises(FileFormatError, match=r"lists 0.bias in model-00002"):
        checkpoints.read(sharded(folder / "one", **{"0.bias": "model-00002-of-00002.safetensors"}))
    shards = sharded(folder / "two")
    index = shards / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"]["0.bias"]
    index.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match=r"does not list 0.bias, which is in model-00001"):
        checkpoints.read(shards)


def test_folders_without_an_index(cli: Cli, folder: Path) -> None:
    (folder / "runs").mkdir()
    torch.save(STATE, "runs/best.pth")
    error = cli("params", "runs/", code=2).err
    assert "without an index" in error
    assert "name a file in it: best.pth" in error
    for name in ("a", "b"):
        (folder / "runs" / f"{name}.index.json").write_text("{}")
    with pytest.raises(RequestError, match="holds 2 indexes"):
        checkpoints.read(folder / "runs")


def test_the_number_of_system_calls_does_not_grow_with_the_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 671 billion parameters has 92,000 tensors in 163 files."""

    def asked(tensors: int) -> int:
        folder = tmp_path / str(tensors)
        folder.mkdir()
        names = {f"{number}.weight": torch.zeros(1) for number in range(tensors)}
        save_file(dict(list(names.items())[::2]), folder / "a.safetensors")
        save_file(dict(list(names.items())[1::2]), folder / "b.safetensors")
        weight_map = {name: "ab"[number % 2] + ".safetensors" for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        calls: list[object] = []
        for name in ("stat", "lstat", "readlink"):
            real = getattr(os, name)

            def counting(*args: Any, _real: Any = real, **given: Any) -> Any:
                calls.append(args)
                return _real(*args, **given)

            monkeypatch.setattr(os, name, counting)
        assert len(checkpoints.read(folder).tensors) == tensors
        monkeypatch.undo()
        return len(calls)

    assert asked(400) == asked(20)


@pytest.mark.parametrize(
    ("text", "twice"),
    [
        ('{"a": 1, "a": 2}', "a"),
        ('{"a": {"b": 1, "b": 2}}', "b"),
        ('{"a": [{"b": 1, "b": 2}]}', "b"),
        ('{"a": {"b": {"c": 1, "c": 2}}}', "c"),
        ('{"a" : 1, "a" : 2, "x": "y"}', "a"),
        ('{"a" : 1, "a": 2}', "a"),
        ('{"a": 1, "a": 2, "b:": "c"}', "a"),
        ('{"a": 1, "a": 2, "b": "{"}', "a"),
        ('{"a": 1, "\\u0061": 2}', "a"),
        ('[{"a": 1, "a": 2}]', "a"),
        ('{"a": {"b": 1}, "a": {}}', "a"),
    ],
)
def test_duplicate_keys_in_json_are_found_at_any_depth(text: str, twice: str) -> None:
    with pytest.raises(ValueError, match=f"the name '{twice}' twice"):
        strict_json.loads(text.encode(), "it")
    once = {"a": {"b": [1, {"c": "d:{"}]}, "e\\": None, "f": '":'}
    assert strict_json.loads(json.dumps(once).encode(), "it") == once
