"""The readers compared with torch and safetensors: equal results for valid files, and one error for damaged ones."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import mmap
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from modelcli import checkpoints
from modelcli.checkpoints import Contents, TensorEntry
from modelcli.checkpoints.storage import Windows
from modelcli.checkpoints.torch_pickle import allow_list, pickles
from modelcli.errors import FileFormatError, ModelcliError, RequestError
from modelcli.live import loading
from modelcli.model.dtypes import ITEM_BYTES
from tests.needs import COMPLETE, torch_version, what_torch_has

#: All dtypes of the newest torch; older versions have fewer.
ALL_DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
)
DTYPES = what_torch_has(ALL_DTYPES)
SAFETENSORS_DTYPES = tuple(name for name in DTYPES if name not in ("complex32", "complex128", "float4_e2m1fn_x2"))


def tensor_of(dtype: str, *shape: int) -> torch.Tensor:
    """Return a tensor of any dtype without zero bytes."""
    wanted = getattr(torch, dtype)
    count = torch.Size(shape).numel() * torch.empty(0, dtype=wanted).element_size()
    data = torch.arange(count) % (1 if dtype == "bool" else 100) + 1
    return data.to(torch.uint8).view(wanted).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, row-major."""
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Require equal dtypes, shapes, strides and bits."""
    assert (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    assert raw(found) == raw(wanted)


def tensors_of(contents: Contents) -> dict[str, torch.Tensor]:
    return loading.mapped(contents).tensors


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def assert_reads_as_torch(path: Path) -> Contents:
    contents = checkpoints.read(path)
    wanted = torch.load(path, weights_only=True)
    found = tensors_of(contents)
    assert list(found) == [name for name, value in wanted.items() if isinstance(value, torch.Tensor)]
    for name, tensor in found.items():
        assert_same(tensor, wanted[name])
    return contents


# --- what torch.save writes ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_dtype(tmp_path: Path, legacy: bool) -> None:
    state = {name: tensor_of(name, 2, 3) for name in DTYPES}
    path = saved(tmp_path / "m.pth", state, _use_new_zipfile_serialization=not legacy)
    # torch cannot read the newer dtypes back out of its own old format.
    contents = checkpoints.read(path) if legacy else assert_reads_as_torch(path)
    assert [entry.dtype for entry in contents.tensors.values()] == list(DTYPES)
    for name, tensor in tensors_of(contents).items():
        assert_same(tensor, state[name])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_no_dimension_no_element_and_views(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(24.0)
    state = {
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0),
        "empty2": torch.zeros(2, 0, 3),
        "base": base,
        "tail": base[20:],
        "transposed": base.view(4, 6).t(),
        "every_other": base[::2],
        "expanded": base[3:4].expand(5),
    }
    path = saved(tmp_path / "m.pth", state, _use_new_zipfile_serialization=not legacy)
    contents = assert_reads_as_torch(path)
    assert (contents.tensors["tail"].offset, contents.tensors["transposed"].stride) == (20, (1, 6))
    views = ("base", "tail", "transposed", "every_other", "expanded")
    assert len({contents.tensors[name].storage for name in views}) == 1


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tied_tensors_are_reported(tmp_path: Path, legacy: bool) -> None:
    weight = torch.randn(3, 2)
    state = {"embed.weight": weight, "part": weight[:1], "head.weight": weight, "other": weight.clone()}
    infos = checkpoints.read(saved(tmp_path / "m.pth", state, _use_new_zipfile_serialization=not legacy)).infos()
    assert {name: info.tied_to for name, info in infos.items()} == {
        "embed.weight": None,
        "part": None,
        "head.weight": "embed.weight",
        "other": None,
    }


def test_empty_tensors_are_not_tied(tmp_path: Path) -> None:
    infos = checkpoints.read(saved(tmp_path / "m.pth", {"a": torch.zeros(0), "b": torch.zeros(0)})).infos()
    assert infos["b"].tied_to is None


def test_a_tensor_tied_to_one_without_a_name(tmp_path: Path) -> None:
    weight = torch.ones(2)
    blueprint = checkpoints.read(saved(tmp_path / "m.pth", {"": weight, "again": weight})).bare_blueprint()
    assert [tensor.identity for tensor in blueprint.tensors] == ["", ""]
    assert blueprint.totals.params == 2


def test_parameters_keep_their_flag(tmp_path: Path) -> None:
    with_attribute = nn.Parameter(torch.ones(1))
    with_attribute.note = "mine"  # type: ignore[attr-defined]
    state = {
        "a": nn.Parameter(torch.ones(2)),
        "b": nn.Parameter(torch.ones(2), requires_grad=False),
        "c": torch.ones(2, requires_grad=True),
        "d": with_attribute,
        "e": torch.ones(1),
    }
    state["e"].note = "mine"  # type: ignore[attr-defined]
    contents = assert_reads_as_torch(saved(tmp_path / "m.pth", state))
    assert [entry.is_parameter for entry in contents.tensors.values()] == [True, True, False, True, False]
    assert [info.requires_grad for info in contents.infos().values()] == [True, False, True, True, None]
    assert not contents.foreign


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_pickle_protocol(tmp_path: Path, protocol: int, legacy: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    checkpoint = {"model": model.state_dict(), "seen": {1, 2}, "raw": bytearray(b"ab"), "n": 2**70, "x": -1.5}
    path = saved(tmp_path / "m.pth", checkpoint, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    contents = checkpoints.read(path)
    for name, tensor in tensors_of(contents).items():
        assert_same(tensor, model.state_dict()[name])
    assert contents.metadata["1"] == {"version": 2}
    assert (contents.tree["n"], contents.tree["x"]) == (2**70, -1.5)
    assert not contents.foreign


def test_names_of_all_kinds(tmp_path: Path) -> None:
    state = {name: torch.ones(1) for name in ("weight", "", "ü.Ω", "a b", "[bold]x", "\x1b[31m", "a..b")}
    assert_reads_as_torch(saved(tmp_path / "m.pth", state))


def test_values_that_are_not_tensors_are_kept_as_extras(tmp_path: Path) -> None:
    state = OrderedDict(weight=torch.ones(2))
    state["block._extra_state"] = {"scale": torch.full((1,), 3.0), "steps": [1, 2], "kind": "fp8"}
    contents = checkpoints.read(saved(tmp_path / "m.pth", state))
    assert list(contents.tensors) == ["weight"]
    extra = contents.extras["block._extra_state"]
    assert isinstance(extra["scale"], TensorEntry)
    assert (extra["steps"], extra["kind"]) == ([1, 2], "fp8")


def test_an_empty_state_dict(tmp_path: Path) -> None:
    contents = checkpoints.read(saved(tmp_path / "m.pth", nn.ReLU().state_dict()))
    assert (contents.tensors, contents.key) == ({}, None)


# --- training checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "ema", "net", "weird"])
def test_the_state_dict_is_found(tmp_path: Path, key: str, legacy: bool) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
    model(torch.ones(2)).backward()
    optimizer.step()
    checkpoint = {"epoch": 3, "optimizer": optimizer.state_dict(), key: model.state_dict(), "best": torch.tensor(0.5)}
    path = saved(tmp_path / "m.pth", checkpoint, _use_new_zipfile_serialization=not legacy)
    contents = checkpoints.read(path)
    assert (contents.key, list(contents.tensors)) == ((key,), ["weight", "bias"])
    assert contents.notes == (f"took the state dict under {key!r} of m.pth",)
    assert contents.tree["epoch"] == 3
    assert list(contents.tree["optimizer"]["state"]) == [0, 1]
    assert isinstance(contents.tree["optimizer"]["state"][0]["momentum_buffer"], TensorEntry)
    assert contents.tree["optimizer"]["param_groups"][0]["lr"] == 0.1


def test_of_several_state_dicts_the_most_usual_is_chosen_and_the_others_are_named(tmp_path: Path) -> None:
    one = {"w": torch.zeros(1)}
    path = saved(tmp_path / "m.pth", {"ema": one, "teacher": one, "model": {"w": torch.ones(1)}, "state_dict": {}})
    contents = checkpoints.read(path)
    assert contents.key == ("model",)
    assert contents.notes == ("took the state dict under 'model' of m.pth; --key takes another: ema, teacher",)
    assert checkpoints.read(path, key="teacher").key == ("teacher",)
    assert checkpoints.read(path, key="teacher").notes == ()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_key(tmp_path: Path, legacy: bool) -> None:
    inner = {"w": torch.ones(1)}
    tree = {"runs": {"best": inner, "v1.0": {"last": inner}}, "a.b": inner, "epoch": 1, "model": inner}
    path = saved(tmp_path / "m.pth", tree, _use_new_zipfile_serialization=not legacy)
    for key, keys in {
        "runs.best": ("runs", "best"),
        "runs.v1.0.last": ("runs", "v1.0", "last"),
        "a.b": ("a.b",),
        "model": ("model",),
    }.items():
        assert checkpoints.read(path, key=key).key == keys
    with pytest.raises(RequestError) as error:
        checkpoints.read(path, key="modle")
    assert error.value.hint == "did you mean model?"
    for key in ("epoch", "epoch.w", "runs", "model.w"):
        with pytest.raises(RequestError, match="not a state dict"):
            checkpoints.read(path, key=key)


def test_no_state_dict_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="a dict with the keys 'epoch', 'lr'"):
        checkpoints.read(saved(tmp_path / "a.pth", {"epoch": 1, "lr": 0.1}))
    with pytest.raises(FileFormatError, match="it is a list"):
        checkpoints.read(saved(tmp_path / "b.pth", [1, 2]))


def test_values_that_occur_twice_stay_one_object(tmp_path: Path) -> None:
    shared: list[Any] = [1]
    contents = checkpoints.read(saved(tmp_path / "m.pth", {"model": {"w": torch.ones(1)}, "a": shared, "b": shared}))
    assert contents.tree["a"] is contents.tree["b"]


# --- files that are damaged ----------------------------------------------------------------------------------------


def training_checkpoint() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return {"model": model.state_dict(), "epoch": 1, "sizes": torch.Size([1, 2]), "n": Counter("ab"), "b": b"\xff"}


def files() -> dict[str, bytes]:
    """Return the bytes of one file of each format."""
    found = {}
    for name, new in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(training_checkpoint(), buffer, _use_new_zipfile_serialization=new)
        found[name] = buffer.getvalue()
    found["safetensors"] = safetensors.torch.save({"a": torch.ones(2, 3), "b": torch.ones(4).half()}, {"x": "y"})
    return found


def read_or_refuse(path: Path) -> Contents | None:
    """Return the contents, or None for the kinds of error that a damaged file may give. Other errors are raised."""
    error: ModelcliError
    try:
        contents = checkpoints.read(path)
        tensors_of(contents)
        return contents
    except ModelcliError as raised:
        error = raised
    assert error.exit_code in (3, 4, 5)
    return None


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_that_is_cut_off(tmp_path: Path, kind: str) -> None:
    data = files()[kind]
    path = tmp_path / "cut.pth"
    for length in {*range(0, len(data), max(1, len(data) // 150)), *range(70), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(ModelcliError) as error:
            checkpoints.read(path)
        assert error.value.exit_code in (4, 5), length


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_flipped_bytes_give_at_most_an_error(tmp_path: Path, kind: str) -> None:
    data = files()[kind]
    draw = random.Random(kind)
    path = tmp_path / "flipped.pth"
    read = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        read += read_or_refuse(path) is not None
    assert 0 < read < 400


def rezipped(data: bytes, pickled: bytes) -> bytes:
    """Return the archive with other bytes as its data.pkl and a matching CRC."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, pickled if info.filename.endswith("/data.pkl") else old.read(info))
    return buffer.getvalue()


def test_flipped_bytes_behind_a_valid_crc(tmp_path: Path) -> None:
    data = files()["zip"]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = archive.read("archive/data.pkl")
    draw = random.Random(0)
    path = tmp_path / "flipped.pth"
    for _ in range(400):
        damaged = bytearray(pickled)
        for _ in range(draw.choice((1, 2, 4))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(rezipped(data, bytes(damaged)))
        try:
            read_or_refuse(path)
        except AssertionError:
            raise AssertionError(f"bytes that broke it: {bytes(damaged)!r}") from None


def with_pickle(folder: Path, pickled: bytes) -> Path:
    path = folder / "made.pth"
    path.write_bytes(rezipped(files()["zip"], pickled))
    return path


def nested(opening: bytes, levels: int, closing: bytes) -> bytes:
    return b"\x80\x02" + opening * levels + closing * levels + b"."


@pytest.mark.parametrize(
    "pickled",
    [
        nested(b"]", 5_000, b"a")[:-2] + b".",
        b"\x80\x02}X\x01\x00\x00\x00a" + nested(b"}K\x01", 5_000, b"s")[2:-1] + b"s.",
        # 60 nested lists, each with the next one twice: 2**60 items in a few hundred bytes.
        b"\x80\x02}X\x01\x00\x00\x00a]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(60)) + b"s.",
        # Such a tuple as a dict key, which takes ages to hash.
        b"\x80\x02})q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60)) + b"K\x01s.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x02N(t",
        b"\x80\x02u.",
        b"",
    ],
    ids=["lists", "dicts", "laughs", "hash", "own list", "own dict", "long", "text", "memo", "end", "mark", "nothing"],
)
def test_hostile_pickles_are_one_error(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(FileFormatError):
        checkpoints.read(with_pickle(tmp_path, pickled))


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02(K\x07q\x00K\x08q\x01h\x01h\x00t.",
        b"\x80\x02(K\x07q\x01K\x08q\x02h\x01h\x02t.",
        b"\x80\x02(K\x07q\x00K\x08q\x05K\x09q\x01K\x0ar\x02\x00\x00\x00h\x00h\x05j\x01\x00\x00\x00h\x02t.",
        b"\x80\x02(K\x07q\x03K\x08q\x03K\x09q\x00K\x0aq\x00h\x00h\x03t.",
        b"(I7\np900\nI8\np0\ng900\ng0\nt.",
        b"\x80\x04(K\x07\x94K\x08q\x05K\x09\x94h\x00h\x05h\x02t.",
    ],
    ids=["from 0", "from 1", "left out", "twice", "text", "counted"],
)
def test_memo_entries_may_have_any_numbers(pickled: bytes) -> None:
    assert pickles.read(pickled, "made").value == pickle.loads(pickled)


def test_a_value_with_many_references_to_itself_is_read_once(tmp_path: Path) -> None:
    shared: list[Any] = [torch.ones(1)]
    for _ in range(60):
        shared = [shared, shared]
    assert checkpoints.read(saved(tmp_path / "m.pth", {"model": {"w": torch.ones(1)}, "tree": shared})).key == (
        "model",
    )


def test_a_tensor_larger_than_its_record_is_an_error(tmp_path: Path) -> None:
    data = files()["zip"]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = archive.read("archive/data.pkl")
    sizes = b"K\x04K\x03\x86"
    assert sizes in pickled
    with pytest.raises(FileFormatError, match=r"needs 60 bytes, but its storage holds 48"):
        checkpoints.read(with_pickle(tmp_path, pickled.replace(sizes, b"K\x05K\x03\x86", 1)))


def test_a_tensor_with_an_impossible_number_of_elements_is_an_error(tmp_path: Path) -> None:
    state = {"w": torch.ones(1).expand(3)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickled = archive.read("archive/data.pkl")
    shape = b"K\x03\x85"
    assert pickled.count(shape) == 1
    huge = b"\x8a\x0a" + (2**70).to_bytes(10, "little") + b"\x85"
    path = tmp_path / "made.pth"
    path.write_bytes(rezipped(buffer.getvalue(), pickled.replace(shape, huge)))
    with pytest.raises(FileFormatError, match="not a whole number from 0 to"):
        checkpoints.read(path)


def test_a_missing_and_a_compressed_record(tmp_path: Path) -> None:
    path = tmp_path / "made.pth"
    for compression, message in ((None, "is missing"), (zipfile.ZIP_BZIP2, "is compressed with method 12")):
        with zipfile.ZipFile(io.BytesIO(files()["zip"])) as old, zipfile.ZipFile(path, "w") as new:
            for info in old.infolist():
                if not info.filename.endswith("data/0"):
                    new.writestr(info.filename, old.read(info))
                elif compression is not None:
                    new.writestr(info.filename, old.read(info), compression)
        with pytest.raises(FileFormatError, match=message):
            checkpoints.read(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_compressed_pickle(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "made.pth"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." * 50)
    data = bytearray(path.read_bytes())
    for start in range(46, 66):
        damaged = data.copy()
        damaged[start] ^= 0xFF
        path.write_bytes(damaged)
        read_or_refuse(path)


def test_a_storage_whose_header_lies_outside_the_file(tmp_path: Path) -> None:
    data = bytearray(files()["zip"])
    position = data.rindex(b"archive/data/0") - 46
    data[position + 42 : position + 46] = struct.pack("<I", 2**31)
    path = tmp_path / "made.pth"
    path.write_bytes(data)
    with pytest.raises(FileFormatError):
        checkpoints.read(path)


# --- files of another kind -----------------------------------------------------------------------------------------


def tar_of(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("storages")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def npz_of(count: int) -> bytes:
    out = io.BytesIO()
    np.savez(out, *[np.ones(number) for number in range(count)])
    return out.getvalue()


def zip_of(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, b"x")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is a text\n", "is not a checkpoint: it starts with b'hello, t'"),
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (b"\n<!doctype html>", "an HTML page"),
        (b"<HTML><body>", "an HTML page"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "a gzip file"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(20), "a 7z archive"),
        (b"\x93NUMPY\x01\x00" + bytes(20), "a NumPy array"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"GGUF" + bytes(20), "a GGUF file"),
        (b"lmgg" + bytes(20), "a GGML file"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(20), "a TensorFlow Lite model"),
        (b"\x1c\x00\x00\x00ET12" + bytes(20), "an ExecuTorch program"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.15.0", "an ONNX model"),
        (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(20), "a rar archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "a zstd file"),
        (b"\x7fELF" + bytes(20), "a program or library for Linux"),
        (b"MZ\x90\x00" + bytes(20), "a program or library for Windows"),
        (b"%PDF-1.7", "a PDF document"),
        (b'{"architectures": ["Bert"]}', "a JSON file"),
        (gzip.compress(b"x"), "a gzip file"),
        (bz2.compress(b"x"), "a bzip2 file"),
        (lzma.compress(b"x"), "an xz file"),
        (tar_of(b"x"), "a tar archive"),
        (npz_of(3), "a NumPy archive"),
        (zip_of("model.weights.h5"), "a Keras model"),
        (zip_of("pytorch_model.bin"), "unpack it, and name pytorch_model.bin"),
        (zip_of("readme.txt"), "that torch.save did not write"),
        (bytes(100), "is not a checkpoint"),
        (b"PK\x03\x04" + bytes(100), "a zip file without a directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_another_kind_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    with pytest.raises(FileFormatError) as error:
        checkpoints.read(path)
    assert message in str(error.value)
    assert error.value.exit_code == 4
    assert str(path) in error.value.message


def test_a_path_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        checkpoints.read(tmp_path / "none.pth")
    with pytest.raises(RequestError, match="is a folder"):
        checkpoints.read(tmp_path)


def test_a_zip_that_torch_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(FileFormatError, match=r"that torch\.save did not write"):
        checkpoints.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("b/data.pkl", b"\x80\x02}.")
    with pytest.raises(FileFormatError, match=r"2 files named data\.pkl"):
        checkpoints.read(path)


def test_a_torch_jit_archive(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 1)), tmp_path / "m.pt")
    contents = checkpoints.read(tmp_path / "m.pt")
    assert (contents.format, list(contents.tensors)) == ("jit", ["weight", "bias"])
    assert contents.foreign  # no check accepts its code


def test_a_big_endian_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(io.BytesIO(files()["zip"])) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, b"big" if info.filename.endswith("byteorder") else old.read(info))
    with pytest.raises(FileFormatError, match="big-endian"):
        checkpoints.read(path)


# --- nothing is executed -------------------------------------------------------------------------------------------


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, (f"open({self.path!r}, 'w').close()",)


class Whole(nn.Module):
    """A module whose unpickling writes a file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.trap = Trap(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickled_module_is_shown_and_its_classes_named_without_running_them(tmp_path: Path, legacy: bool) -> None:
    sprung = tmp_path / "sprung"
    module = Whole(str(sprung))
    path = saved(tmp_path / "m.pth", module, _use_new_zipfile_serialization=not legacy)
    contents = checkpoints.read(path)
    assert list(contents.tensors) == list(module.state_dict())
    assert f"{__name__}.Whole" in contents.foreign
    assert not sprung.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    assert sprung.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_names_beside_a_state_dict_are_named(tmp_path: Path, protocol: int) -> None:
    sprung = tmp_path / "sprung"
    checkpoint = {"model": {"w": torch.ones(1)}, "args": Trap(str(sprung)), "path": Path("x"), "f": frozenset({1})}
    contents = checkpoints.read(saved(tmp_path / "m.pth", checkpoint, pickle_protocol=protocol))
    assert list(contents.tensors) == ["w"]
    assert {name.rpartition(".")[2] for name in contents.foreign} == {"exec", "PosixPath", "frozenset"}
    assert not sprung.exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_values_count_as_foreign_if_torch_refuses_them(tmp_path: Path) -> None:
    """For each value: torch loads it with weights_only exactly if modelcli finds no foreign name in it."""
    values: list[Any] = [
        *(torch.float32, torch.Size([1]), torch.device("cpu"), {1}, 1j, bytearray(b"x"), b"x", Counter("a")),
        *(OrderedDict(a=1), torch.strided, torch.eye(2).to_sparse(), torch.per_tensor_affine, 2**80, None, "x"),
        *(frozenset({1}), Path("x"), slice(1), Trap("x"), nn.ReLU(), range(3)),  # of exceptions, versions differ
    ]
    for value in values:
        path = saved(tmp_path / "m.pth", {"model": {"w": torch.ones(1)}, "value": value})
        try:
            torch.load(path, weights_only=True)
            loads = True
        except pickle.UnpicklingError:
            loads = False
        assert (not checkpoints.read(path).foreign) == loads, value


def test_the_allowed_names_are_those_that_torch_allows() -> None:
    """For each name. An older torch allows fewer dtypes; a dtype runs no code."""
    allowed = set(torch._weights_only_unpickler._get_allowed_globals())
    assert allowed <= allow_list.HARMLESS
    ours = {name.replace("__builtin__", "builtins") for name in allow_list.HARMLESS}  # as Python 2 called it
    dtypes = {"torch.bcomplex32"} if torch_version() >= COMPLETE else {f"torch.{name}" for name in ITEM_BYTES}
    assert ours - allowed <= {"torch._utils._rebuild_nested_tensor", *dtypes}  # torch 2.12 lacks the function


class OfAnotherDevice:
    """An object pickled like a tensor of a device without storages, such as a TPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (self.tensor, self.tensor.dtype, "cpu", True)


def test_a_tensor_of_another_device(tmp_path: Path) -> None:
    contents = assert_reads_as_torch(saved(tmp_path / "m.pth", {"w": OfAnotherDevice(torch.arange(5.0)[2:])}))
    assert (contents.tensors["w"].offset, contents.tensors["w"].requires_grad) == (2, True)
    assert not contents.foreign


# --- safetensors ---------------------------------------------------------------------------------------------------


def test_safetensors_of_every_dtype(tmp_path: Path) -> None:
    state = {name: tensor_of(name, 2, 3) for name in SAFETENSORS_DTYPES}
    state |= {"scalar": torch.tensor(3), "empty": torch.zeros(0, 3)}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors", {"format": "pt", "by": "hand"})
    contents = checkpoints.read(tmp_path / "m.safetensors")
    assert contents.metadata == {}  # `_metadata` of modules, which a safetensors file has none of
    found = tensors_of(contents)
    assert set(found) == set(state)
    for name, tensor in found.items():
        assert_same(tensor, state[name])


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "m.pth")
    saved(tmp_path / "m.safetensors", {"a": torch.ones(1)})
    assert checkpoints.read(tmp_path / "m.pth").format == "safetensors"
    assert checkpoints.read(tmp_path / "m.safetensors").format == "pth"


def made_safetensors(folder: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "made.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def f32(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


BROKEN: dict[str, tuple[object, bytes, str]] = {
    "a hole between two": ({"a": f32(0, 4, 1), "b": f32(8, 12, 1)}, bytes(12), "b starts at byte 8, .* ends at 4"),
    "a hole at the start": ({"a": f32(4, 8, 1)}, bytes(8), "a starts at byte 4"),
    "two that overlap": ({"a": f32(0, 8, 2), "b": f32(4, 8, 1)}, bytes(8), "b starts at byte 4, .* ends at 8"),
    "bytes behind the last": ({"a": f32(0, 4, 1)}, bytes(5), "its header describes"),
    "bytes that are missing": ({"a": f32(0, 4, 1)}, bytes(3), "its header describes"),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b"",
        "the name 'a' twice",
    ),
    "more bytes than its shape": ({"a": f32(0, 8, 1)}, bytes(8), r"a of shape \[1\] needs 4 bytes, .* states 8"),
    "fewer bytes than its shape": ({"a": f32(0, 4, 2)}, bytes(4), r"needs 8 bytes, .* states 4"),
    "an end before its start": ({"a": f32(4, 0, 1)}, bytes(4), "states -4"),
    "a negative size": ({"a": f32(0, 4, -1)}, bytes(4), "not a whole number"),
    "a size that is no number": ({"a": {**f32(0, 4), "shape": ["1"]}}, bytes(4), "not a whole number"),
    "a size that is true": ({"a": {**f32(0, 4), "shape": [True]}}, bytes(4), "not a whole number"),
    "a size that is true behind one that is 1": (
        {"a": f32(0, 4, 1), "b": {**f32(4, 8), "shape": [True]}},
        bytes(8),
        "'b' in its header is not valid: .*not a whole number",
    ),
    "an offset that is no whole number": (
        {"a": {**f32(0, 4, 1), "data_offsets": [0.0, 4]}},
        bytes(4),
        "'a' in its header is not valid",
    ),
    "a size beyond 64 bits": ({"a": f32(0, 0, 0, 2**70)}, b"", "from 0 to 2"),
    "more elements than 64 bits": ({"a": f32(0, 0, 0, 2**40, 2**40)}, b"", "more elements"),
    "an infinite offset": (
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[Infinity,4]}}',
        bytes(4),
        "Infinity is not a number",
    ),
    "an unknown dtype": ({"a": {**f32(0, 4, 1), "dtype": "X9"}}, bytes(4), "'a' in its header is not valid"),
    "a dtype that is a list": ({"a": {**f32(0, 4, 1), "dtype": []}}, bytes(4), "'a' in its header is not valid"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "'a' in its header is not valid"),
    "three offsets": ({"a": {**f32(0, 4, 1), "data_offsets": [0, 4, 4]}}, bytes(4), "'a' in its header is not valid"),
    "an entry that is a list": ({"a": [1]}, b"", "'a' in its header is not valid"),
    "metadata that is a list": ({"__metadata__": ["x"]}, b"", "__metadata__"),
    "metadata that is no text": ({"__metadata__": {"x": 1}}, b"", "__metadata__"),
    "no JSON": (b"{hello}", b"", "its header is not valid"),
    "no UTF-8": (b'{"\xff": 1}', b"", "its header is not valid"),
    "UTF-16": ('{"a": 1}'.encode("utf-16-le"), b"", "its header is not valid"),
    "deep nesting": (b'{"a":' * 100_000, b"", "its header is not valid"),
}


#: Headers that the format forbids, or that no tensor can have, but that safetensors' own reader accepts.
LAX = ("a name twice", "more elements than 64 bits")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules_of_safetensors(tmp_path: Path, name: str) -> None:
    header, body, message = BROKEN[name]
    path = made_safetensors(tmp_path, header, body)
    with pytest.raises(FileFormatError, match=message):
        checkpoints.read(path)
    if name not in LAX:
        with pytest.raises((safetensors.SafetensorError, UnicodeDecodeError)), safetensors.safe_open(path, "pt"):
            pass


def test_a_header_that_lists_tensors_in_another_order_than_their_bytes(tmp_path: Path) -> None:
    header = {"b": f32(8, 20, 3), "a": f32(0, 4, 1), "c": f32(4, 8, 1), "none": f32(20, 20, 0)}
    path = made_safetensors(tmp_path, header, struct.pack("<5f", 1, 2, 3, 4, 5))
    found = checkpoints.read(path).tensors
    assert list(found) == list(header)
    with safetensors.safe_open(path, "pt") as theirs:
        for name, entry in found.items():
            assert entry.storage.bytes() == raw(theirs.get_tensor(name))
    ordered = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    again = checkpoints.read(made_safetensors(tmp_path, ordered, struct.pack("<5f", 1, 2, 3, 4, 5))).tensors
    assert list(again) == ["a", "c", "b", "none"]
    assert {name: (entry.shape, entry.storage.offset - found["a"].storage.offset) for name, entry in found.items()} == {
        name: (entry.shape, entry.storage.offset - again["a"].storage.offset) for name, entry in again.items()
    }


def test_the_length_of_a_safetensors_header(tmp_path: Path) -> None:
    for length, message in ((2**63, "the limit is 100,000,000"), (1000, "its header should have 1,000 bytes")):
        with pytest.raises(FileFormatError, match=message):
            checkpoints.read(made_safetensors(tmp_path, {"a": f32(0, 4, 1)}, bytes(4), length))


def test_an_empty_safetensors_file(tmp_path: Path) -> None:
    assert checkpoints.read(made_safetensors(tmp_path, {})).tensors == {}


# --- spans ---------------------------------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {"a": torch.ones(3)})
    span = checkpoints.read(path).tensors["a"].storage
    assert span.bytes() == raw(torch.ones(3)) == bytes(span.mapped())
    saved(path, {"a": torch.ones(5)})
    for use in (span.bytes, span.mapped):
        with pytest.raises(FileFormatError, match="changed while it was being read"):
            use()


def test_a_file_of_many_tensors_is_opened_once(tmp_path: Path) -> None:
    """A process may open few files, and each memory mapping keeps its file open."""
    resource = pytest.importorskip("resource", reason="limits of that kind are not there")
    state = {f"{number}.weight": torch.full((2,), float(number)) for number in range(300)}
    contents = checkpoints.read(saved(tmp_path / "m.pth", state))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        loaded, again = loading.mapped(contents).tensors, loading.mapped(contents).tensors
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    loaded["7.weight"].fill_(0)
    assert again["7.weight"].tolist() == [7.0, 7.0]
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_tensors_across_two_windows(tmp_path: Path) -> None:
    state = {str(number): torch.arange(1000.0) + number for number in range(40)}
    contents = checkpoints.read(saved(tmp_path / "m.pth", state))
    windows = Windows(mmap.ALLOCATIONGRANULARITY, most=2)
    for name, entry in contents.tensors.items():
        assert isinstance(entry, TensorEntry)
        assert bytes(entry.storage.mapped(windows)) == state[name].numpy().tobytes()


def test_writes_into_mapped_tensors_stay_in_memory(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {"a": torch.ones(3)})
    before = path.read_bytes()
    tensors_of(checkpoints.read(path))["a"].add_(1)
    assert path.read_bytes() == before


# --- archives that different programs would read differently --------------------------------------------------------


@pytest.mark.parametrize("name", ["archive/data/0", "ARCHIVE/DATA/0", "archive/data.pkl"])
def test_a_duplicate_record_name_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.pth"
    with path.open("wb") as file:
        torch.save({"w": torch.ones(3)}, file)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(name, b"\0" * 12)
    with pytest.raises(FileFormatError, match="twice"):
        checkpoints.read(path)


def test_overlapping_records_are_refused(tmp_path: Path) -> None:
    """The directory gives one record the offset of another."""
    path = tmp_path / "m.pth"
    with path.open("wb") as file:
        torch.save({"v": torch.ones(3), "w": torch.zeros(3)}, file)
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"archive/data/{number}").header_offset for number in (0, 1))
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    moved = data[:directory] + data[directory:].replace(struct.pack("<I", second), struct.pack("<I", first), 1)
    path.write_bytes(moved)
    with pytest.raises(FileFormatError, match="overlap"):
        checkpoints.read(path)


def test_a_record_with_another_name_in_its_own_header(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    with path.open("wb") as file:
        torch.save({"w": torch.ones(3)}, file)
    path.write_bytes(path.read_bytes().replace(b"archive/data/0", b"archive/data/9", 1))
    with pytest.raises(FileFormatError, match="has a name other than the directory's"):
        checkpoints.read(path)


def test_a_file_with_a_name_of_any_script(tmp_path: Path) -> None:
    """torch.save takes the archive's prefix from the file's name."""
    path = tmp_path / "modèle-模型.pth"
    torch.save({"w": torch.ones(3)}, path)
    assert checkpoints.read(path).tensors["w"].storage.bytes() == torch.ones(3).numpy().tobytes()
