"""Quantized, sparse and meta tensors are shown as rows, kept when saved, and loaded into models."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import nn

from modelcli import checkpoints
from modelcli.checkpoints import CompositeEntry
from modelcli.commands import python_api
from modelcli.errors import FileFormatError, RequestError
from modelcli.live import composites
from tests.checkpoints.test_checkpoints import made_safetensors, rezipped, saved
from tests.checkpoints.test_equality import QUIET
from tests.conftest import Cli
from tests.needs import needs_torch

pytestmark = QUIET

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mask", torch.zeros(3, 3, device="cpu").to_sparse())
        self.register_buffer("codes", torch.quantize_per_tensor(torch.zeros(2, 3, device="cpu"), 1.0, 0, torch.qint8))

    def forward(self, x):
        return self.layer(x)
"""


def state_dict() -> OrderedDict[str, torch.Tensor]:
    """Return a state dict with a tensor of each kind; the masks are one tensor under two names."""
    mask, scales = torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.float64)
    return OrderedDict(
        {
            "layer.weight": torch.ones(3, 3),
            "mask": mask,
            "mask_again": mask,
            "csr": nn.Parameter(torch.eye(4).to_sparse_csr()),
            "codes": torch.quantize_per_tensor(torch.arange(6.0).reshape(2, 3), 0.5, 1, torch.qint8),
            "rows": torch.quantize_per_channel(torch.ones(2, 3), scales, torch.arange(2), 0, torch.quint8),
            "halves": torch.quantize_per_channel(torch.ones(3, 5), torch.ones(3), torch.ones(3), 0, torch.quint4x2),
            "absent": torch.empty(2, 3, device="meta"),
        }
    )


def test_quantized_and_sparse_tensors_have_rows(cli: Cli, folder: Path) -> None:
    saved(folder / "m.pth", state_dict())
    document = cli("params", "m.pth", "--json").json
    rows = {row["name"]: row for row in document["tensors"]}
    assert list(rows) == list(state_dict())
    assert {name: (row["shape"], row["dtype"], row["bytes"]) for name, row in rows.items()} == {
        "layer.weight": ([3, 3], "float32", 36),
        "mask": ([3, 3], "float32", 2 * 3 * 8 + 3 * 4),  # indices of two dimensions, values
        "mask_again": ([3, 3], "float32", 60),
        "csr": ([4, 4], "float32", 5 * 8 + 4 * 8 + 4 * 4),  # where rows start, columns, values
        "codes": ([2, 3], "qint8", 6),
        "rows": ([2, 3], "quint8", 6 + 2 * 8 + 2 * 8),  # scales and zero points of the channels
        "halves": ([3, 5], "quint4x2", 3 * 3 + 3 * 4 + 3 * 4),  # two in a byte, each row from a new one
        "absent": ([2, 3], "float32", 0),
    }
    assert {name: row["layout"] for name, row in rows.items() if "layout" in row} == {
        "mask": "sparse_coo",
        "mask_again": "sparse_coo",
        "csr": "sparse_csr",
    }
    assert (rows["csr"]["kind"], rows["csr"]["trainable"]) == ("parameter", True)
    assert rows["mask_again"]["tied_to"] == "mask"
    totals = document["totals"]
    once = sum(row["bytes"] for name, row in rows.items() if name != "mask_again")
    assert totals["param_bytes"] + totals["buffer_bytes"] == once
    table = cli("params", "m.pth", "--values").out.splitlines()
    assert table[0].split() == ["name", "shape", "dtype", *TITLES, "layout", "tied", "to", "values"]
    assert table[1].split()[-3:] == ["strided", "-", "[[1,1,1],[1,1,1],[1,1,1]]"]
    assert table[2].split()[-3:] == ["sparse_coo", "-", "-"]


TITLES = ("elements", "bytes", "kind", "trainable")


def test_composite_tensors_with_the_same_parts_are_tied(tmp_path: Path) -> None:
    mask, codes = torch.eye(3).to_sparse(), state_dict()["codes"]
    state = {"mask": mask, "detached": mask.detach(), "copy": mask.clone(), "codes": codes, "codes2": codes.detach()}
    infos = checkpoints.read(saved(tmp_path / "m.pth", state)).infos()
    ties = {"detached": "mask", "codes2": "codes"}
    assert {name: info.tied_to for name, info in infos.items()} == dict.fromkeys(state) | ties


@pytest.mark.parametrize("name", ["mask", "csr", "codes", "absent"])
def test_a_state_dict_of_only_composite_tensors_is_found(tmp_path: Path, name: str) -> None:
    contents = checkpoints.read(saved(tmp_path / "m.pth", {"model": {name: state_dict()[name]}, "epoch": 1}))
    assert (contents.key, list(contents.tensors)) == (("model",), [name])


def test_composite_tensors_of_a_pickled_module(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    module.register_buffer("mask", torch.eye(3).to_sparse())
    infos = checkpoints.read(saved(tmp_path / "m.pth", module)).infos()
    assert list(infos) == list(module.state_dict())
    assert infos["mask"].layout == "sparse_coo"


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        ours = found[name]
        assert (ours.shape, ours.dtype, ours.layout) == (tensor.shape, tensor.dtype, tensor.layout)
        if tensor.layout != torch.strided:
            assert ours.to_dense().equal(tensor.to_dense())
        elif tensor.is_quantized:
            assert ours.dequantize().equal(tensor.dequantize())
        else:
            assert ours.is_meta if tensor.is_meta else ours.equal(tensor)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_saving_keeps_composite_tensors(cli: Cli, folder: Path, legacy: bool) -> None:
    """They are kept in the state dict and in the checkpoint around it."""
    tree = {"model": state_dict(), "best": [torch.eye(2).to_sparse(), state_dict()["rows"]]}
    saved(folder / "m.pth", tree, _use_new_zipfile_serialization=not legacy)
    written = cli("save", "out.pth", "-m", "m.pth", "--json").json
    assert written["tensors"] == 8
    loaded = torch.load("out.pth", weights_only=True)
    assert_same_tensors(loaded["model"], state_dict())
    assert_same_tensors(dict(enumerate(loaded["best"])), dict(enumerate(tree["best"])))  # type: ignore[arg-type]
    columns = ("name", "shape", "dtype", "bytes", "layout", "tied_to")
    before, after = (
        {row["name"]: [row.get(column) for column in columns] for row in cli("params", path, "--json").json["tensors"]}
        for path in ("m.pth", "out.pth")
    )
    assert after == before
    cli("save", "bare.pth", "-m", "m.pth", "--bare")
    assert_same_tensors(torch.load("bare.pth", weights_only=True), state_dict())
    assert "layer" in cli("freeze", "layer", "-m", "m.pth", "-o", "frozen.pth").out
    assert "csr has no parameters" in cli("freeze", "csr", "-m", "m.pth", code=2).err
    error = cli("save", "out.safetensors", "-m", "m.pth", code=2).err
    assert "absent is float32 on the meta device, which safetensors does not support" in error


def test_a_bare_storage_is_kept(cli: Cli, folder: Path) -> None:
    storage = torch.arange(3.0).untyped_storage()
    saved(folder / "m.pth", {"model": {"w": torch.ones(1)}, "storage": storage})
    cli("save", "out.pth", "-m", "m.pth")
    assert torch.load("out.pth", weights_only=True)["storage"].tolist() == storage.tolist()


def test_composite_tensors_load_into_a_model_and_are_saved_again(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(MODEL, encoding="utf-8")
    layer = nn.Linear(3, 3)
    state = {
        "mask": torch.eye(3).to_sparse(),
        "codes": state_dict()["codes"],
        "layer.weight": layer.weight.detach(),
        "layer.bias": layer.bias.detach(),
    }
    saved(folder / "m.pth", state)
    assert cli("load", "m.pth", "--arch", "own.py:Net", "--dry-run", "--json").json["matched"] == 4
    cli("save", "out.pth", "-m", "m.pth", "--arch", "own.py:Net")
    assert_same_tensors(torch.load("out.pth", weights_only=True), state)
    rows = {row["name"]: row for row in cli("params", "out.pth", "--json").json["tensors"]}
    assert (rows["mask"]["layout"], rows["mask"]["bytes"], rows["codes"]["dtype"]) == ("sparse_coo", 60, "qint8")
    model = python_api.load("out.pth", arch="own.py:Net")
    assert_same_tensors(dict(model.state_dict()), state)


# --- damaged and hostile -------------------------------------------------------------------------------------------


def with_pickle(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Change the pickle of a file, with a matching CRC."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = archive.read(name)
    changed = change(pickled)
    assert changed != pickled
    path.write_bytes(rezipped(path.read_bytes(), changed))
    return path


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda pickled: pickled.replace(old, new, 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("codes", replaced(b"K\x02K\x03\x86", b"K\x03K\x03\x86"), "needs 9 bytes, but its storage holds 6"),
        ("codes", replaced(b"QInt8Storage", b"CharStorage"), "cannot have the dtype int8"),
        ("codes", replaced(b"per_tensor_affine", b"float32"), "has no scale"),
        ("codes", replaced(b"K\x02K\x03\x86", b"K\x02K\xff\x86"), "needs 258 bytes"),
        ("halves", replaced(b"K\x03K\x05\x86", b"K\x03K\x07\x86"), "needs 12 bytes, but its storage holds 9"),
        ("mask", replaced(b"torch.sparse_coo", b"torch.sparse_bsr"), "layout 'sparse_bsr' has no indices and values"),
        (
            "mask",
            replaced(b"K\x03K\x03\x86", b"K\x03X\x01\x00\x00\x00a\x86"),
            "a size or stride is 'a', which is not a whole number",
        ),
        ("absent", replaced(b"float32", b"float31"), "torch has no dtype float31"),
    ],
)
def test_damaged_composite_tensors_are_errors(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    path = saved(tmp_path / "m.pth", {"w": torch.ones(1), name: state_dict()[name]})
    with pytest.raises(FileFormatError, match=message):
        checkpoints.read(with_pickle(path, change))


def test_indices_outside_the_shape_are_shown_and_not_loaded(tmp_path: Path) -> None:
    """torch would read memory outside the tensor."""
    outside = torch.sparse_coo_tensor(torch.tensor([[0, 9]]), torch.ones(2), (3,), check_invariants=False)
    contents = checkpoints.read(saved(tmp_path / "m.pth", {"mask": outside}))
    assert contents.infos()["mask"].shape == (3,)
    entry = contents.tensors["mask"]
    assert isinstance(entry, CompositeEntry)
    with pytest.raises(FileFormatError, match="mask is damaged: size is inconsistent with indices"):
        composites.real("mask", entry)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


class Rigged:
    """An object pickled as a quantized tensor and a parameter, with another object in place of the hooks."""

    def __init__(self, trap: Trap) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        make, args = state_dict()["codes"].__reduce_ex__(2)  # type: ignore[misc]
        inner = Call(make, (*args[:6], self.trap))
        return torch._utils._rebuild_parameter, (inner, False, self.trap)  # type: ignore[return-value]


class Call:
    def __init__(self, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.make, self.args = make, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.make, self.args


def test_objects_in_place_of_hooks_are_refused(cli: Cli, folder: Path) -> None:
    saved(folder / "m.pth", {"w": torch.ones(1), "codes": Rigged(Trap(folder / "sprung"))})
    for words in (("params", "m.pth"), ("save", "out.pth", "-m", "m.pth", "--tensors-only")):
        assert "hooks" in cli(*words, code=4).err
    assert not (folder / "sprung").exists()
    assert not (folder / "out.pth").exists()


# --- types of safetensors that torch has in pairs, or not at all ---------------------------------------------------


def sub_byte(folder: Path, dtype: str, shape: list[int], nbytes: int) -> Path:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}
    return made_safetensors(folder, {"w": entry}, bytes(range(nbytes)))


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        *(
            pytest.param("F4", *case, marks=needs_torch("float4_e2m1fn_x2"))
            for case in (([4], 2), ([3, 2], 3), ([0], 0))
        ),
        pytest.param("F8_E8M0", [3], 3, marks=needs_torch("float8_e8m0fnu")),
    ],
)
def test_safetensors_dtypes_that_torch_reads(tmp_path: Path, dtype: str, shape: list[int], nbytes: int) -> None:
    path = sub_byte(tmp_path, dtype, shape, nbytes)
    with safetensors.safe_open(path, "pt") as reader:
        wanted = reader.get_tensor("w")
    info = checkpoints.read(path).infos()["w"]
    assert (info.shape, info.dtype) == (tuple(wanted.shape), str(wanted.dtype).removeprefix("torch."))
    assert (info.nbytes, info.kind) == (nbytes, "parameter")


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes", "name"),
    [
        ("F4", [2, 3], 3, "float4_e2m1fn"),
        ("F6_E2M3", [2, 2], 3, "float6_e2m3fn"),
        ("F6_E3M2", [8], 6, "float6_e3m2fn"),
    ],
)
def test_safetensors_dtypes_that_torch_lacks(
    cli: Cli, folder: Path, dtype: str, shape: list[int], nbytes: int, name: str
) -> None:
    """They are shown, with sizes counted in bits. safetensors itself cannot load them."""
    path = sub_byte(folder, dtype, shape, nbytes)
    with safetensors.safe_open(path, "pt") as reader:
        assert reader.get_slice("w").get_shape() == shape
        with pytest.raises((safetensors.SafetensorError, AttributeError)):  # AttributeError: torch is older than F4
            reader.get_tensor("w")
    (row,) = cli("params", path, "--json").json["tensors"]
    assert (row["shape"], row["dtype"], row["bytes"], row["kind"]) == (shape, name, nbytes, "parameter")
    assert f"w has the dtype {name}, which torch does not have" in cli("save", "out.pth", "-m", path, code=2).err
    entry = checkpoints.read(path).tensors["w"]
    assert isinstance(entry, CompositeEntry)
    with pytest.raises(RequestError, match="which torch does not have"):
        composites.real("w", entry)


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), [("F4", [3], 2), ("F4", [], 1), ("F6_E2M3", [3], 3)])
def test_a_tensor_that_ends_inside_a_byte_is_an_error(
    tmp_path: Path, dtype: str, shape: list[int], nbytes: int
) -> None:
    path = sub_byte(tmp_path, dtype, shape, nbytes)
    with pytest.raises(FileFormatError, match="would end inside a byte"):
        checkpoints.read(path)
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "pt"):
        pass


@needs_torch("float4_e2m1fn_x2")
def test_packed_tensors_without_a_dimension_cannot_be_saved_as_safetensors(cli: Cli, folder: Path) -> None:
    pair = torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    saved(folder / "m.pth", {"w": pair})
    assert "w is float4_e2m1fn_x2 without a dimension" in cli("save", "out.safetensors", "-m", "m.pth", code=2).err
