"""The writers compared with torch, safetensors and zipfile: the written files load equal, and nothing is lost."""

from __future__ import annotations

import json
import os
import pickletools
import stat
import struct
import subprocess
import sys
import textwrap
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from modelcli import checkpoints, writing
from modelcli.checkpoints import Contents
from modelcli.checkpoints import record as records
from modelcli.checkpoints.record import Record
from modelcli.checkpoints.torch_pickle import pickling
from modelcli.checkpoints.torch_pickle import writing as torch_zip
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque
from modelcli.checkpoints.zip_archives import layout as zip_layout
from modelcli.commands.editable import open_editable
from modelcli.errors import ModelcliError, RequestError, SystemFailureError
from modelcli.files import atomic
from modelcli.language.references import Source
from modelcli.live.opening import open_live
from modelcli.live.planning import plan
from modelcli.live.sources import Value
from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.tensors import TensorInfo
from modelcli.writing import Plan, PlannedTensor, WriteOptions
from tests.benchmarks.bench_writing import sparse_pth
from tests.checkpoints.test_checkpoints import (
    DTYPES,
    SAFETENSORS_DTYPES,
    assert_same,
    raw,
    saved,
    tensor_of,
    tensors_of,
)
from tests.conftest import Cli
from tests.values.test_statistics import sparse_file


@dataclass(frozen=True)
class Bytes:
    """A source that compares by value, so that equal bytes are one storage."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def files(self) -> tuple[()]:
        return ()

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), 5):
            yield self.data[start : start + 5]


def planned(tensor: torch.Tensor, storages: dict[int, Value]) -> PlannedTensor:
    storage = tensor.untyped_storage()
    return PlannedTensor(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        stride=tuple(tensor.stride()),
        offset=int(tensor.storage_offset()),
        source=storages.setdefault(storage._cdata, Value(storage)),
    )


def plan_of(state: Mapping[str, torch.Tensor], record: str = "{}", **more: Any) -> Plan:
    storages: dict[int, Value] = {}
    return Plan({name: planned(tensor, storages) for name, tensor in state.items()}, record, **more)


def plan_from(contents: Contents, record: str = "{}") -> Plan:
    """Return a plan that writes the whole content of a file again."""
    tensors = {
        name: PlannedTensor(entry.shape, entry.dtype, entry.stride, entry.offset, entry.storage)
        for name, entry in contents.tensors.items()
    }
    return Plan(tensors, record, contents.metadata, contents.extras, contents.tree, contents.key)


def record_of(state: Mapping[str, torch.Tensor], seed: int = 0, ties: Mapping[str, str] | None = None) -> str:
    infos = tuple(
        TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tied_to=(ties or {}).get(name))
        for name, tensor in state.items()
    )
    return records.to_text(Record(None, None, seed, (), (), Blueprint((ModuleInfo("", None),), infos)))


def write(plan: Plan, path: Path, **options: Any) -> Path:
    writing.write(plan, path, WriteOptions(force=True, **options))
    return path


def torch_loads(path: Path) -> Iterator[Any]:
    for mmap in (False, True):
        yield torch.load(path, weights_only=True, mmap=mmap)


def assert_loads_as(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    for loaded in torch_loads(path):
        assert list(loaded) == list(state)
        for name, tensor in loaded.items():
            assert_same(tensor, state[name])


def data_offsets(path: Path) -> dict[str, int]:
    """Return where the data of each record of a zip file starts, according to its local headers."""
    data, found = path.read_bytes(), {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, extra = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
            found[info.filename] = info.header_offset + 30 + name + extra
    return found


def assert_sound(path: Path) -> None:
    """Every CRC is right, nothing is compressed, and every storage starts on a 64-byte boundary."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert len(archive.namelist()) == len(set(archive.namelist()))
    assert not [name for name, offset in data_offsets(path).items() if offset % 64]


# --- .pth ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype(tmp_path: Path) -> None:
    state = {name: tensor_of(name, 2, 3) for name in DTYPES}
    path = write(plan_of(state), tmp_path / "m.pth")
    assert_loads_as(path, state)
    assert_sound(path)
    again = write(plan_from(checkpoints.read(path)), tmp_path / "again.pth")
    assert again.read_bytes() == path.read_bytes()


def test_no_dimension_no_element_views_and_odd_names(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    state = {
        "scalar": torch.tensor(3),
        "empty": torch.zeros(2, 0, 3),
        "base": base,
        "tail": base[20:],
        "transposed": base.view(4, 6).t(),
        "expanded": base[3:4].expand(5),
        "odd": torch.arange(7, dtype=torch.uint8),
        "ü.Ω\n[bold]": torch.ones(1),
        "": torch.ones(1),
    }
    path = write(plan_of(state), tmp_path / "m.pth")
    assert_loads_as(path, state)
    assert_sound(path)
    for loaded in torch_loads(path):
        assert loaded["tail"].untyped_storage()._cdata == loaded["base"].untyped_storage()._cdata


def test_an_empty_state_dict_is_written(tmp_path: Path) -> None:
    path = write(plan_of({}), tmp_path / "m.pth")
    assert [dict(loaded) for loaded in torch_loads(path)] == [{}, {}]


def test_tied_tensors_are_one_storage(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    path = write(plan_of({"a": weight, "b": weight, "c": weight.clone()}), tmp_path / "m.pth")
    for loaded in torch_loads(path):
        pointers = [tensor.untyped_storage()._cdata for tensor in loaded.values()]
        assert pointers[0] == pointers[1] != pointers[2]
    assert len([name for name in data_offsets(path) if "/data/" in name]) == 2


def test_one_storage_read_as_two_dtypes_is_written_twice(tmp_path: Path) -> None:
    """torch.save refuses it, because a record with two storage classes would load as the first of them."""
    base = torch.arange(4.0)
    state = {"floats": base, "ints": base.view(torch.int32), "u16": base.view(torch.uint16)}
    assert_loads_as(write(plan_of(state), tmp_path / "m.pth"), state)


def test_it_is_a_state_dict_that_a_module_loads(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = model.state_dict()
    path = write(plan_of(state, metadata=dict(state._metadata)), tmp_path / "m.pth")  # type: ignore[attr-defined]
    for loaded in torch_loads(path):
        assert isinstance(loaded, OrderedDict)
        assert loaded._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).load_state_dict(loaded)


def test_same_bytes_on_repeat_and_under_every_name(tmp_path: Path) -> None:
    state = {"a": torch.ones(3), "b": torch.ones(2).half(), "c": torch.zeros(5, dtype=torch.int8)}
    for suffix in (".pth", ".pt", ".safetensors"):
        written = {write(plan_of(state), tmp_path / f"{name}{suffix}").read_bytes() for name in ("a", "ü b", "a")}
        assert len(written) == 1


def test_the_result_of_a_write(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "m.pth"
    written = writing.write(plan_of({"a": torch.ones(3)}), path)
    assert (written.path, written.format, written.tensors) == (path, "pth", 1)
    assert written.nbytes == path.stat().st_size


@pytest.mark.parametrize("limit", [0, 40, 100, 130, 2000])
def test_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The headers of records beyond 4 GiB, forced for small ones: some of them, all, or only those in the directory."""
    monkeypatch.setattr(zip_layout, "ZIP64_FROM", limit)
    state = {f"t{size}": torch.arange(size, dtype=torch.float32) for size in (1, 9, 10, 24, 25, 32, 33, 300)}
    path = write(plan_of(state, record="x" * 120), tmp_path / "m.pth")
    monkeypatch.undo()
    assert_loads_as(path, state)
    assert_sound(path)
    assert {name: raw(tensor) for name, tensor in tensors_of(checkpoints.read(path)).items()} == {
        name: raw(tensor) for name, tensor in state.items()
    }


def test_a_source_that_gives_too_little_is_noticed(tmp_path: Path) -> None:
    class Short(Bytes):
        def chunks(self) -> Iterator[bytes]:
            yield self.data[:-4]

    tensor = PlannedTensor((3,), "float32", (1,), 0, Short(bytes(12)))
    for name in ("m.pth", "m.safetensors"):
        with pytest.raises(ModelcliError):
            writing.write(Plan({"a": tensor}, "{}"), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_oracle_torch_save(tmp_path: Path) -> None:
    """The pickle has the same meaning as torch's: torch and modelcli load both to the same values."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4))
    theirs = checkpoints.read(saved(tmp_path / "theirs.pth", model.state_dict()))
    ours = checkpoints.read(write(plan_from(theirs), tmp_path / "ours.pth"))
    assert ours.metadata == theirs.metadata
    for name, entry in ours.tensors.items():
        other = theirs.tensors[name]
        assert (entry.shape, entry.stride, entry.dtype) == (other.shape, other.stride, other.dtype)
        assert entry.storage.bytes() == other.storage.bytes()


# --- training checkpoints ------------------------------------------------------------------------------------------


def test_tensors_come_to_the_opcodes_of_torch_save(tmp_path: Path) -> None:
    """A reader that knows these opcodes reads a tensor in one step, and the Python unpickler shares equal objects."""
    sizes = [(2, 3), (7,), (1, 300), (70_000, 1), (1, 2, 3, 4, 5)] * 80
    state = {f"layers.{number}.weight": torch.zeros(size) for number, size in enumerate(sizes)}
    ours, theirs = write(plan_of(state), tmp_path / "ours.pth"), saved(tmp_path / "theirs.pth", OrderedDict(state))
    opcodes = [[opcode.name for opcode, _, _ in pickletools.genops(pickle_in(path))] for path in (ours, theirs)]
    tensors = [found[found.index("BINUNICODE") : found.index("SETITEMS")] for found in opcodes]
    assert tensors[0] == tensors[1]


def pickle_in(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def training_checkpoint(model: nn.Module) -> dict[Any, Any]:
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    shared = [1, 2]
    return {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "model": model.state_dict(),
        "nested": OrderedDict(a=OrderedDict(b=(1, 2.5, None, True, ()))),
        "set": {1, 2},
        "empty set": set(),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "bytes": b"\x00\xff",
        "bytearray": bytearray(b"ab"),
        "counter": Counter("aab"),
        "complex": 1 - 2j,
        "numbers": [0, 255, 256, -1, 2**31, -(2**31), 2**63, -(2**70), float("inf"), 1e-300],
        "text": "ü\n\x00",
        "tuples": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        1: "one",
        (1, "a"): "pair",
        "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "grad": torch.ones(2, requires_grad=True),
        "rng": torch.get_rng_state(),
        "shared": [shared, shared],
        "fp8": torch.ones(2).to(torch.float8_e4m3fn),
    }


def plain(value: Any) -> Any:
    """Convert a value to one that compares with `==`: tensors become their parts, and types are kept."""
    if isinstance(value, torch.Tensor):
        return (type(value), value.dtype, value.shape, value.requires_grad, raw(value))
    if isinstance(value, dict):
        return (type(value), [(key, plain(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return (type(value), [plain(item) for item in value])
    return (type(value), value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_tree_around_the_state_dict_is_kept(tmp_path: Path, legacy: bool) -> None:
    checkpoint = training_checkpoint(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    if legacy:
        del checkpoint["fp8"]  # torch cannot read it from its own old format
    source = saved(tmp_path / "a.pth", checkpoint, _use_new_zipfile_serialization=not legacy)
    contents = checkpoints.read(source)
    path = write(plan_from(contents), tmp_path / "b.pth")
    wanted = torch.load(source, weights_only=True)
    for loaded in torch_loads(path):
        assert plain(loaded) == plain(wanted)
        assert loaded["shared"][0] is loaded["shared"][1]
        optimizer = torch.optim.Adam(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).parameters())
        optimizer.load_state_dict(loaded["optimizer"])
    assert_sound(path)
    once_more = write(plan_from(checkpoints.read(path)), tmp_path / "c.pth")
    assert once_more.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_newer_pickle_protocols_become_one_that_torch_loads(tmp_path: Path, protocol: int) -> None:
    checkpoint = training_checkpoint(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    contents = checkpoints.read(saved(tmp_path / "a.pth", checkpoint, pickle_protocol=protocol))
    for loaded in torch_loads(write(plan_from(contents), tmp_path / "b.pth")):
        assert plain(loaded) == plain(checkpoint)


def test_a_state_dict_deep_inside_is_replaced_where_it_stood(tmp_path: Path) -> None:
    tree = {"a.b": OrderedDict(c=OrderedDict(w=torch.ones(1)), d=1), "e": 2}
    contents = checkpoints.read(saved(tmp_path / "a.pth", tree), key="a.b.c")
    plan = replace(plan_from(contents), tensors=plan_of({"v": torch.zeros(2)}).tensors)
    for loaded in torch_loads(write(plan, tmp_path / "b.pth")):
        assert (loaded["e"], loaded["a.b"]["d"], list(loaded["a.b"]["c"])) == (2, 1, ["v"])


def test_extras_are_kept_beside_the_tensors(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(2), "l._extra_state": {"scale": torch.ones(1), "b": b"x"}, "epoch": 3}
    contents = checkpoints.read(saved(tmp_path / "a.pth", state))
    for loaded in torch_loads(write(plan_from(contents), tmp_path / "b.pth")):
        assert plain(dict(loaded)) == plain(state)


def test_sparse_tensors_around_a_state_dict_are_kept(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = saved(tmp_path / "a.pth", {"model": {"w": torch.ones(1)}, "mask": torch.eye(3).to_sparse()})
        for loaded in torch_loads(write(plan_from(checkpoints.read(source)), tmp_path / "b.pth")):
            assert loaded["mask"].to_dense().equal(torch.eye(3))


def test_values_that_hold_themselves(tmp_path: Path) -> None:
    own: list[Any] = [1]
    own.append(own)
    many: list[Any] = []
    for _ in range(60):
        many = [many, many]
    source = saved(tmp_path / "a.pth", {"model": {"w": torch.ones(1)}, "own": own, "many": many})
    for loaded in torch_loads(write(plan_from(checkpoints.read(source)), tmp_path / "b.pth")):
        assert loaded["own"][1] is loaded["own"]


def test_values_that_cannot_be_pickled_are_errors() -> None:
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    for value, message in (
        (deep, "nested deeper than"),
        (object(), "of type object"),
        (1 << 3000, "more than 255 bytes"),
        (Opaque(Global("a", "b"), ((), {}), how="newobj_ex"), "keyword arguments"),
    ):
        with pytest.raises(RequestError, match=message):
            pickling.dumps(value, lambda _source, _dtype: ("0", 0))


# --- the record ----------------------------------------------------------------------------------------------------


def test_the_position_of_the_record(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    text = record_of(state, seed=7)
    path = write(plan_of(state, text), tmp_path / "m.pth")
    for loaded in torch_loads(path):
        assert loaded._metadata[".modelcli"] == text
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/.data/modelcli.json").decode() == text
    assert torch._C.PyTorchFileReader(str(path)).get_record(".data/modelcli.json").decode() == text
    other = write(plan_of(state, text), tmp_path / "m.safetensors")
    with safetensors.safe_open(other, "pt") as reader:
        assert reader.metadata()["modelcli"] == text
    for written in (path, other):
        contents = checkpoints.read(written)
        assert contents.record == records.from_text(text)
        assert ".modelcli" not in contents.metadata
        assert "modelcli" not in contents.metadata


def changed_zip_record(path: Path, text: bytes | None, *, bad_crc: bool = False) -> Path:
    out = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith(".json"):
                new.writestr(info.filename, old.read(info))
            elif text is not None:
                new.writestr(info.filename, text)
    if bad_crc and text:
        data = out.read_bytes()
        assert data.count(text) == 1
        out.write_bytes(data.replace(text, text[:-1] + b"]"))
    return out


def test_of_two_copies_the_zip_record_wins(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    path = write(plan_of(state, record_of(state, seed=1)), tmp_path / "m.pth")

    def seed(text: bytes | None, **how: Any) -> int | None:
        record = checkpoints.read(changed_zip_record(path, text, **how)).record
        return record.seed if record else None

    assert seed(record_of(state, seed=2).encode()) == 2
    assert seed(None) == 1
    for damaged in (b"", b"{", b"\xff\xfe", b"[]", b'{"schema":1}', b"[" * 100_000, b'{"schema":99}'):
        assert seed(damaged) == 1
    assert seed(record_of(state, seed=2).encode(), bad_crc=True) == 1


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_a_damaged_record_is_ignored(tmp_path: Path, name: str) -> None:
    good = json.loads(record_of({"a": torch.ones(2)}))
    damaged: list[Any] = ["", "x", "[]", {}, {**good, "seed": -1}, {**good, "seed": "1"}, {**good, "edits": ["fly"]}]
    damaged += [{**good, "blueprint": {}}, {**good, "frozen": None}, {**good, "input_size": 3}]
    for text in damaged:
        plan = plan_of({"a": torch.ones(2)}, text if isinstance(text, str) else json.dumps(text))
        contents = checkpoints.read(write(plan, tmp_path / name))
        assert contents.record is None
        assert list(contents.tensors) == ["a"]


def test_an_alias_of_another_shape_is_ignored(tmp_path: Path) -> None:
    told = {"a": torch.ones(2), "b": torch.ones(3)}
    text = record_of(told, ties={"b": "a"})
    contents = checkpoints.read(write(plan_of({"a": torch.ones(2)}, text), tmp_path / "m.safetensors"))
    assert list(contents.tensors) == ["a"]


# --- .safetensors --------------------------------------------------------------------------------------------------


def test_safetensors_of_every_dtype(tmp_path: Path) -> None:
    state = {name: tensor_of(name, 2, 3) for name in SAFETENSORS_DTYPES}
    state |= {
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "empty2": torch.zeros(0),
        "odd": torch.ones(1).bool(),
    }
    path = write(plan_of(state), tmp_path / "m.safetensors")
    loaded = safetensors.torch.load_file(path)
    assert set(loaded) == set(state)
    for name, tensor in loaded.items():
        assert_same(tensor, state[name])
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0
    for name, entry in checkpoints.read(path).tensors.items():
        assert isinstance(entry.storage, checkpoints.Span)
        assert entry.storage.offset % state[name].element_size() == 0


def test_safetensors_holds_a_tied_tensor_once_and_all_its_names_come_back(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    state = {"a": weight, "b": torch.ones(1), "c": weight}
    path = write(plan_of(state, record_of(state, ties={"c": "a"})), tmp_path / "m.safetensors")
    assert set(safetensors.torch.load_file(path)) == {"a", "b"}
    contents = checkpoints.read(path)
    assert list(contents.tensors) == ["a", "b", "c"]
    assert contents.infos()["c"].tied_to == "a"


def test_dtypes_that_safetensors_lacks(tmp_path: Path) -> None:
    for state, message in (
        ({"w": torch.ones(1, dtype=torch.complex128)}, "w is complex128"),
        ({"\ud800": torch.ones(1)}, "no valid text"),
    ):
        with pytest.raises(RequestError, match=message) as error:
            writing.write(plan_of(state), tmp_path / "m.safetensors")
        assert error.value.hint == "write a .pth file"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["safetensors", "folder"])
def test_a_tensor_with_the_reserved_name_of_the_metadata(tmp_path: Path, kind: str) -> None:
    state = {"w": torch.ones(2), "__metadata__": torch.zeros(3)}
    with pytest.raises(RequestError, match="a tensor named __metadata__") as error:
        writing.write(plan_of(state), tmp_path / "out.safetensors", kind=kind)
    assert (error.value.hint, error.value.exit_code) == ("write a .pth file", 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["safetensors", "folder"])
def test_names_of_tied_tensors_do_not_overwrite_metadata(tmp_path: Path, kind: str) -> None:
    """Such a name is in the record, and is tied again when the file is read."""
    weight = torch.randn(2, 3)
    names = ("a", "format", "total_size", "modelcli", "author", "z")
    state = dict.fromkeys(names, weight) | {"pt": torch.ones(1)}
    texts = {"format": "pt", "author": "somebody"}
    path = tmp_path / "out.safetensors"
    writing.write(plan_of(state, record_of(state, ties=dict.fromkeys(names[1:], "a")), texts=texts), path, kind=kind)
    if kind == "folder":
        metadata = json.loads((path / "model.safetensors.index.json").read_text())["metadata"]
        assert metadata["total_size"] == weight.nbytes + 4
        files = list(path.glob("*.safetensors"))
    else:
        files = [path]
    for file in files:
        with safetensors.safe_open(file, "pt") as reader:
            assert texts.items() <= reader.metadata().items()
    contents = checkpoints.read(path)
    assert list(contents.tensors) == list(state)
    assert contents.record is not None
    assert contents.texts == texts
    assert {name: info.tied_to for name, info in contents.infos().items()} == dict.fromkeys(names, "a") | {
        "a": None,
        "pt": None,
    }


def test_formats_by_suffix(tmp_path: Path) -> None:
    assert [writing.format_of(name) for name in ("a.pth", "a.PT", "a.safetensors")] == ["pth", "pth", "safetensors"]
    for name in ("a", "a.no_format", "a.onnx"):
        with pytest.raises(RequestError, match="does not say which format"):
            writing.format_of(name)


# --- from a live model ---------------------------------------------------------------------------------------------


def live_plan(model: str, out: Path, kind: str, folder: Path, **options: Any) -> Plan:
    return open_editable(Source(model=model, folder=folder)).plan(out, kind, **options)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_views_and_ties_of_a_bare_checkpoint(tmp_path: Path, suffix: str) -> None:
    """A view stays a view in a .pth and becomes its own elements in safetensors; ties are kept in both."""
    base = torch.arange(12.0)
    state = {"a": base.view(3, 4).t(), "b": base[4:8], "c": base[4:8], "d": base, "e": torch.ones(2, 2).t()}
    saved(tmp_path / "in.pth", state)
    path = tmp_path / f"out.{suffix}"
    write(live_plan("in.pth", path, {"pth": "pth"}.get(suffix, suffix), tmp_path), path)
    if suffix == "pth":
        assert_loads_as(path, state)
    else:
        loaded = safetensors.torch.load_file(path)
        assert set(loaded) == {"a", "b", "d", "e"}
        assert all(tensor.equal(state[name]) and tensor.is_contiguous() for name, tensor in loaded.items())
    contents = checkpoints.read(path)
    assert list(contents.tensors) == list(state)
    assert contents.infos()["c"].tied_to == "b"
    assert all(tensor.equal(state[name]) for name, tensor in tensors_of(contents).items())


def test_bare_drops_the_training_checkpoint(tmp_path: Path) -> None:
    state: dict[str, Any] = {"l.w": torch.ones(1), "l._extra_state": [1], "epoch": 3}
    saved(tmp_path / "a.pth", {"model": state, "lr": 0.1})
    out = tmp_path / "b.pth"
    write(live_plan("a.pth", out, "pth", tmp_path), out)
    for loaded in torch_loads(out):
        assert (loaded["lr"], set(loaded["model"])) == (0.1, set(state))
    write(live_plan("a.pth", out, "pth", tmp_path, bare=True), out)
    for loaded in torch_loads(out):
        assert set(loaded) == {"l.w", "l._extra_state"}
    with pytest.raises(RequestError, match="is not a tensor, but safetensors stores only tensors"):
        live_plan("a.pth", tmp_path / "b.safetensors", "safetensors", tmp_path)


def test_extra_state_of_a_module_is_written_and_loads(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    out = tmp_path / "m.pth"
    write(live_plan("own.py:Counts", out, "pth", tmp_path), out)
    for loaded in torch_loads(out):
        extra = loaded["_extra_state"]
        assert extra["seen"] == {1, 2}
        assert (extra["size"], extra["dtype"], extra["raw"]) == (torch.Size([3]), torch.float16, b"ab")
        assert extra["scale"].tolist() == [2.0]
    live = open_live(Source(model="m.pth", arch="own.py:Counts", folder=tmp_path))
    assert live.module.got["seen"] == {1, 2}
    assert live.module.got["raw"] == b"ab"
    again = tmp_path / "again.pth"
    write(plan(live, again, "pth"), again)
    assert [plain(dict(loaded)) for loaded in torch_loads(again)] == [plain(dict(one)) for one in torch_loads(out)]


OWN = """
from collections import Counter, OrderedDict
import torch
from torch import nn


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, device="cpu"))
        self.got = {
            "seen": {1, 2}, "size": torch.Size([3]), "dtype": torch.float16, "raw": b"ab", "none": b"",
            "scale": torch.full((1,), 2.0, device="cpu"), "counter": Counter("aab"), "ordered": OrderedDict(a=(1, [2])),
            "array": bytearray(b"xy"), "complex": 1j,
        }

    def get_extra_state(self):
        return self.got

    def set_extra_state(self, state):
        self.got = state
"""


# --- replacing a file ----------------------------------------------------------------------------------------------


def replace_with(path: Path, data: bytes, *, force: bool = True) -> None:
    with atomic.replacing(path, force=force) as (file, _):
        file.write(data)


def fail_midway(path: Path, error: type[BaseException]) -> None:
    with atomic.replacing(path, force=True) as (file, temporary):
        file.write(b"new")
        assert temporary.parent == path.parent
        raise error("midway")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_midway_leaves_only_the_old_file(tmp_path: Path, error: type[BaseException], exists: bool) -> None:
    path = tmp_path / "m.pth"
    if exists:
        path.write_bytes(b"old")
    raised = SystemFailureError if error is OSError else error
    with pytest.raises(raised):
        fail_midway(path, error)
    assert [entry.name for entry in tmp_path.iterdir()] == (["m.pth"] if exists else [])
    assert not exists or path.read_bytes() == b"old"


def test_a_file_that_fails_verification_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(b"old")
    other = torch_zip.layout(plan_of({"b": torch.ones(2)}))
    monkeypatch.setattr(torch_zip, "layout", lambda _plan: other)
    with pytest.raises(SystemFailureError, match="not what was written"):
        writing.write(plan_of({"a": torch.ones(2)}), path, WriteOptions(force=True))
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (b"old", 1)


def test_a_full_disk(tmp_path: Path) -> None:
    class Full(Bytes):
        def chunks(self) -> Iterator[bytes]:
            raise OSError(28, "No space left on device")

    tensor = PlannedTensor((3,), "float32", (1,), 0, Full(bytes(12)))
    with pytest.raises(SystemFailureError, match=r"m\.pth: No space left on device"):
        writing.write(Plan({"a": tensor}, "{}"), tmp_path / "m.pth")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(b"old")
    for use in (
        lambda: replace_with(path, b"new", force=False),
        lambda: writing.check_target(path, force=False),
        lambda: writing.write(plan_of({}), path),
    ):
        with pytest.raises(RequestError, match="exists") as error:
            use()
        assert error.value.hint == "--force replaces it"
    assert path.read_bytes() == b"old"
    replace_with(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    with pytest.raises(RequestError, match="appeared meanwhile"), atomic.replacing(path, force=False):
        path.write_bytes(b"another's")
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (b"another's", 1)


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_the_mode_of_a_written_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    before = os.umask(0o027)
    try:
        replace_with(path, b"new")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        replace_with(path, b"newer")
    finally:
        assert os.umask(before) == 0o027
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_the_parent_folder_is_made(tmp_path: Path) -> None:
    replace_with(tmp_path / "a" / "b" / "m.pth", b"new")
    assert (tmp_path / "a" / "b" / "m.pth").read_bytes() == b"new"


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "m.pth", tmp_path / "link.pth"
    link.symlink_to(target)
    for data in (b"first", b"second"):
        replace_with(link, data)
        assert link.is_symlink()
        assert target.read_bytes() == data
    assert len(list(tmp_path.iterdir())) == 2
    loop = tmp_path / "loop.pth"
    loop.symlink_to(loop)
    with pytest.raises(SystemFailureError):
        replace_with(loop, b"")


def test_targets_that_are_not_regular_files(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is a folder"):
        replace_with(tmp_path, b"")
    if Path("/dev/null").exists():
        with pytest.raises(RequestError, match="is a device or a pipe"):
            replace_with(Path("/dev/null"), b"")
    file = tmp_path / "file"
    file.write_bytes(b"x")
    for path in (file / "m.pth", file / "deeper" / "m.pth"):
        with pytest.raises(RequestError, match="file is not a folder"):
            replace_with(path, b"")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SystemFailureError, match="no permission") as error:
        writing.check_target(tmp_path / "new" / "m.pth", force=False)
    assert error.value.exit_code == 5
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_can_be_written_onto_itself(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    state = {"a": torch.arange(2000.0), "b": torch.ones(3)}
    write(plan_of(state), path)
    contents = checkpoints.read(path)
    kept = {"b": plan_from(contents).tensors["b"], "a": plan_from(contents).tensors["a"]}
    write(replace(plan_from(contents), tensors=kept), path)
    found = tensors_of(checkpoints.read(path))
    assert {name: raw(tensor) for name, tensor in found.items()} == {name: raw(state[name]) for name in state}


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pth", {"w": torch.ones(2)})
    plan = plan_from(checkpoints.read(source))
    saved(source, {"w": torch.ones(3)})
    with pytest.raises(ModelcliError, match="changed while it was being read"):
        writing.write(plan, tmp_path / "b.pth")
    assert not (tmp_path / "b.pth").exists()


def test_a_record_header_is_what_its_arithmetic_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every size around the limit the data starts on a boundary, whatever comes before it."""
    monkeypatch.setattr(zip_layout, "ZIP64_FROM", 64)
    for size in range(55, 70):
        state = {str(number): torch.full((size,), number, dtype=torch.uint8) for number in (1, 2, 3)}
        path = write(plan_of(state), tmp_path / "m.pth")
        data = path.read_bytes()
        for number in (1, 2, 3):
            assert data.index(bytes([number]) * 50) % 64 == 0
        assert_sound(path)


MAKERS: tuple[Callable[[], Any], ...] = (lambda: {1}, lambda: b"x", lambda: bytearray(b"x"), lambda: torch.Size([1]))


@pytest.mark.parametrize("make", MAKERS)
def test_values_of_a_tree_survive_two_rounds(tmp_path: Path, make: Callable[[], Any]) -> None:
    source = write(
        plan_from(checkpoints.read(saved(tmp_path / "a.pth", {"model": {"w": torch.ones(1)}, "v": [make()] * 2}))),
        tmp_path / "b.pth",
    )
    for loaded in torch_loads(write(plan_from(checkpoints.read(source)), tmp_path / "c.pth")):
        assert loaded["v"] == [make()] * 2


# --- memory --------------------------------------------------------------------------------------------------------

with_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="/proc says how much memory a process takes"
)
#: The elements of each tensor of a large file: 25 MB.
ELEMENTS = 6_250_000
LARGE = f"""
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.PReLU({ELEMENTS}) for _ in range(40))
"""


def memory_of(folder: Path, code: str) -> dict[str, int]:
    """What a new process that runs some code takes, in MB: the peak, and of what it has at the end the part of its own.

    The rest are pages of files, which the system takes back where it needs them.
    """
    report = "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith(('VmHWM', 'RssAnon'))))"
    run = [sys.executable, "-c", f"{textwrap.dedent(code)}\n{report}"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, own = done.stdout.splitlines()[-1].split()
    return {"peak": int(peak) // 1024, "own": int(own) // 1024}


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Return the memory that `import torch` alone needs."""
    return memory_of(tmp_path_factory.mktemp("torch"), "import torch")


def large(path: Path, tensors: int) -> Path:
    """Write a checkpoint of some tensors of 25 MB each whose bytes are holes."""
    if path.suffix == ".pth":
        sparse_pth(path, [ELEMENTS] * tensors)
    else:
        sparse_file(path, {f"layers.{number}.weight": [ELEMENTS] for number in range(tensors)})
    return path


@with_proc
@pytest.mark.parametrize("name", ["in.pth", "in.safetensors"])
def test_an_edit_of_3_gb_in_bounded_memory(folder: Path, of_torch: dict[str, int], name: str) -> None:
    """Some values are converted and others copied; the peak is less than 150 MB above that of `import torch`."""
    nbytes = large(folder / name, 120).stat().st_size
    out = folder / f"out{Path(name).suffix}"
    taken = memory_of(
        folder,
        f"from modelcli.cli import main; assert main(['cast', 'layers.0', 'half', '-m', '{name}', '-o', '{out}']) == 0",
    )
    assert out.stat().st_size > nbytes - 4 * ELEMENTS
    assert taken["peak"] < of_torch["peak"] + 150


@with_proc
@pytest.mark.parametrize("name", ["in.pth", "in.safetensors"])
def test_a_model_of_1_gb_is_not_held_in_memory(folder: Path, of_torch: dict[str, int], name: str) -> None:
    """Its values stay pages of the file, even after reading; the peak is what its constructor allocates first."""
    large(folder / name, 40)
    (folder / "large.py").write_text(LARGE)
    code = f"""
        import modelcli
        model = modelcli.load('{name}', arch='large.py:Net')
        assert [float(weight.sum()) for weight in model.parameters()] == [0] * 40
    """
    taken = memory_of(folder, code)
    assert taken["own"] < of_torch["own"] + 150
    assert taken["peak"] < of_torch["peak"] + 40 * 25 + 150


def test_messages_name_a_folder_as_commands_accept_it(cli: Cli) -> None:
    """A word without a slash is the name of a builder."""
    assert cli("save", "shards/", "-m", "Linear(2,3)", "--json").json["output"] == "shards/"
    told = cli("freeze", ".", "-m", "shards/", "-o", "again/").out
    assert "written: again/ (" in " ".join(told.split())
    cli("params", "again/")
