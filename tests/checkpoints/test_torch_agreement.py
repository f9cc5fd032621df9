"""modelcli shows, checks and saves what torch loads: every pickle construct has the same meaning, or is refused.

Truth is `torch.load(weights_only=True)`, and Python's `zipfile` and `tarfile` for what they find in a file.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelcli import checkpoints
from modelcli.checkpoints.torch_pickle import allow_list, conj_and_neg, pickles
from modelcli.errors import FileFormatError
from modelcli.live import loading
from tests import hostile
from tests.conftest import Cli
from tests.fuzz import agreement
from tests.hostile import archive, legacy, name, number, sizes, state_dict, tensor, text

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:Detected pickle protocol")

#: The bytes of storage 0 and of storage 1.
ONE, OTHER = struct.pack("<2f", 1, 2), struct.pack("<2f", float("nan"), 8)
GRAD = b"\x88"
HOOKS = name("collections.OrderedDict") + b")R"
ANOTHER = tensor(key=text("1"))


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def packed(path: Path, pickled: bytes, **records: bytes) -> Path:
    """Write an archive with a pickle and the storages 0 and 1."""
    path.write_bytes(archive(pickled, {"data/0": ONE, "data/1": OTHER} | records))
    return path


def raw(found: torch.Tensor) -> bytes:
    return bytes(found.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8).tolist())


def assert_as_torch(path: Path) -> checkpoints.Contents:
    """Require that all tensors of a file have the dtype, shape, stride and values that torch loads."""
    wanted = torch.load(path, weights_only=True)
    contents = checkpoints.read(path)
    tensors = loading.mapped(contents).tensors
    assert list(tensors) == [key for key, value in wanted.items() if isinstance(value, torch.Tensor)]
    for key, found in tensors.items():
        same = wanted[key]
        assert (found.dtype, found.shape, found.stride()) == (same.dtype, same.shape, same.stride())
        assert raw(found) == raw(same), key
        assert contents.tensors[key].requires_grad in (same.requires_grad, None)
        assert contents.tensors[key].is_parameter == isinstance(same, nn.Parameter)
    return contents


def assert_refused(path: Path, says: str) -> None:
    with pytest.raises(FileFormatError, match=says):
        checkpoints.read(path)


def guards(path: Path) -> list[str]:
    return ["check", str(path), "--safe", "--finite", "--max-params", "100"]


# --- states set on tensors -----------------------------------------------------------------------------------------


def parameter(data: bytes, grad: bytes = GRAD) -> bytes:
    return name("torch._utils._rebuild_parameter") + b"(" + data + grad + HOOKS + b"tR"


SET_ANEW = ANOTHER.partition(b"(")[2].partition(b"Q")[0] + b"Q"


@pytest.mark.parametrize(
    "made",
    [
        tensor() + b"(" + SET_ANEW + b"K\x00" + sizes(2) + sizes(1) + b"tb",
        tensor() + b")b",
        parameter(tensor(), b"\x89") + b"(" + SET_ANEW + b"K\x00" + sizes(2) + sizes(1) + b"tb",
        parameter(tensor()) + b"(" + ANOTHER + b"NN\x89" + HOOKS + b"tb",
    ],
    ids=["set_", "set_ of nothing", "a parameter of four", "a parameter of five"],
)
def test_a_tensor_whose_state_replaces_its_values_is_refused(cli: Cli, folder: Path, made: bytes) -> None:
    path = packed(folder / "m.pth", state_dict(("w", made)))
    loaded = torch.load(path, weights_only=True)["w"]
    assert not torch.equal(loaded.nan_to_num(), torch.tensor([1.0, 2.0]))
    assert_refused(path, "changes a tensor after it has made it")
    cli(*guards(path), code=4)
    cli("save", "o.pth", "-m", path, code=4)
    assert not (folder / "o.pth").exists()


def test_a_state_on_a_tensor_from_the_memo_is_refused(tmp_path: Path) -> None:
    """The memo returns the same tensor again, so a state set on it changes both entries."""
    pickled = state_dict(("w", tensor() + b"q\x07"), ("x", b"h\x07)b"))
    assert torch.load(packed(tmp_path / "m.pth", pickled), weights_only=True)["w"].numel() == 0
    assert_refused(tmp_path / "m.pth", "changes a tensor after")


@pytest.mark.parametrize("call", [b"(" + tensor() + b"tR", tensor() + b"\x85\x81"], ids=["REDUCE", "NEWOBJ"])
@pytest.mark.parametrize("state", [b"", b"(\x89\x89" + HOOKS + b"tb"], ids=["trained", "frozen by its state"])
def test_parameters_as_torch_wrote_them_before_0_4(tmp_path: Path, call: bytes, state: bytes) -> None:
    path = packed(tmp_path / "m.pth", state_dict(("w", name("torch.nn.parameter.Parameter") + call + state)))
    assert assert_as_torch(path).tensors["w"].requires_grad is not bool(state)


@pytest.mark.parametrize("attribute", ["data", "real", "requires_grad", "__class__"])
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("function", ["_rebuild_parameter_with_state", "_rebuild_from_type_v2"])
def test_an_attribute_that_makes_another_tensor_is_refused(
    tmp_path: Path, attribute: str, slots: bool, function: str
) -> None:
    state = b"}" + text(attribute) + ANOTHER + b"s"
    state = b"(N" + state + b"t" if slots else state
    if function == "_rebuild_parameter_with_state":
        made = name(f"torch._utils.{function}") + b"(" + tensor() + GRAD + HOOKS + state + b"tR"
    else:
        inside = tensor()[len(name("torch._utils._rebuild_tensor_v2")) : -1]
        named = name("torch._utils._rebuild_tensor_v2") + name("torch.Tensor")
        made = name(f"torch._tensor.{function}") + b"(" + named + inside + state + b"tR"
    assert_refused(packed(tmp_path / "m.pth", state_dict(("w", made))), "which can change its values")


def test_data_in_the_dict_of_a_tensor_is_refused(cli: Cli, folder: Path) -> None:
    shown = torch.ones(4)
    shown.__dict__["data"] = torch.full((4000,), 7.0)
    path = saved(folder / "m.pth", {"w": shown})
    assert torch.load(path, weights_only=True)["w"].numel() == 4000
    saved(folder / "ones.pth", {"w": torch.ones(4)})
    cli(*guards(path), "--same-as", "ones.pth", code=4)
    assert "'data'" in cli("save", "o.pth", "-m", path, code=4).err


def test_every_settable_attribute_of_a_tensor_is_known() -> None:
    """The attributes for which torch.Tensor has a setter that does more than store the value."""
    writable = set()
    for attribute in dir(torch.Tensor):
        values: tuple[Any, ...] = (torch.ones(2), torch.zeros(3, dtype=torch.complex64), None, True, {})
        for value in values:
            made = torch.ones(2, dtype=torch.complex64)
            try:
                setattr(made, attribute, value)
            except (AttributeError, TypeError, RuntimeError, UserWarning):
                continue
            if attribute not in made.__dict__:
                writable.add(attribute)
    assert {one for one in writable if not one.startswith("__")} <= allow_list.TENSOR_PROPERTIES
    assert "data" in writable


def test_tensors_in_attributes_are_named_and_fail_a_check(cli: Cli, folder: Path) -> None:
    scaled = nn.Parameter(torch.ones(4))
    scaled.__dict__["scale"] = torch.tensor([float("nan")])
    path = saved(folder / "m.pth", {"w": scaled})
    assert_as_torch(path)
    assert "attributes that contain tensors (scale)" in cli("params", path).err
    assert "the attribute 'scale' of a tensor cannot be looked at" in cli("check", path, "--finite", code=1).out
    scaled.__dict__["scale"] = "per row"
    cli(*guards(saved(path, {"w": scaled})))


@pytest.mark.parametrize(
    "made",
    [
        name("torch.Size") + b"(" + sizes(2) + b"tR}" + text("a") + b"Nsb",
        name("torch.device") + b"(" + text("cpu") + b"tRNb",
        b"]Nb",
        b"}Nb",
        name("torch.Size") + b"(" + sizes(2) + b"tRK\x01a",
        name("builtins.set") + b"(]tRK\x01a",
        name("builtins.set") + b"(]tRK\x01K\x01s",
        name("torch.Tensor") + b")R}b",
    ],
)
def test_a_state_or_items_on_known_objects_are_refused(tmp_path: Path, made: bytes) -> None:
    path = packed(tmp_path / "m.pth", state_dict(("w", tensor()), ("x", made)))
    assert_refused(path, "sets the state|sets items|appends values")


def test_the_states_of_dicts_are_those_of_torch(tmp_path: Path) -> None:
    """Two states of an OrderedDict are merged, and an object created by `__new__` with items has none."""
    twice = b"}" + text("_metadata") + b"}" + text("") + b"Nssb}" + text("b") + b"Nsb"
    new = name("collections.OrderedDict") + b"(](" + text("x") + ANOTHER + b"\x86et\x81"
    path = packed(tmp_path / "m.pth", b"\x80\x02" + new + b"(" + text("w") + tensor() + b"u" + twice + b".")
    assert assert_as_torch(path).metadata == {"": None}
    assert torch.load(path, weights_only=True)._metadata == {"": None}


def test_tensors_in_a_counter_are_found(cli: Cli, folder: Path) -> None:
    path = saved(folder / "m.pth", {"w": torch.ones(2), "c": Counter({"a": 1})})
    cli(*guards(path))
    counter = name("collections.Counter") + b")R" + text("a") + ANOTHER + b"s"
    path = packed(folder / "m.pth", state_dict(("w", tensor()), ("c", counter)))
    assert torch.load(path, weights_only=True)["c"]["a"].isnan().any()
    assert "c cannot be looked at" in cli("check", path, "--finite", code=1).out


# --- conjugated and negated tensors --------------------------------------------------------------------------------

TORCH_FAILS = ("complex32", "legacy")
COMPLEX = ("complex32", "complex64", "complex128")


@pytest.mark.parametrize(
    ("dtype", "protocol"),
    # That torch writes complex32 in its old format, and cannot read it there, is torch's.
    [(dtype, protocol) for dtype in COMPLEX for protocol in ("zip", "legacy") if (dtype, protocol) != TORCH_FAILS],
)
def test_a_conjugated_tensor_has_the_values_of_torch(tmp_path: Path, dtype: str, protocol: str) -> None:
    made = torch.tensor([[1 + 2j, -3 - 4j, 0j], [1j, 2 + 0j, 5 - 6j]], dtype=torch.complex64).to(getattr(torch, dtype))
    options = {"_use_new_zipfile_serialization": False} if protocol == "legacy" else {}
    state = {"w": made.conj(), "t": made.t().conj(), "row": made.conj()[1], "plain": made}
    path = saved(tmp_path / "m.pth", state, **options)
    contents = assert_as_torch(path)
    assert contents.tensors["w"].storage is contents.tensors["t"].storage
    assert contents.tensors["w"].storage is not contents.tensors["plain"].storage


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_negated_tensor_has_the_values_of_torch(tmp_path: Path, dtype: str) -> None:
    made = torch.tensor([1.5, -2, 0, float("inf")], dtype=torch.float64).to(getattr(torch, dtype))
    assert_as_torch(saved(tmp_path / "m.pth", {"w": torch._neg_view(made), "v": made}))


def test_a_tensor_negated_and_conjugated(tmp_path: Path) -> None:
    made = torch.tensor([1 + 2j, 3 - 4j])
    state = {"both": torch._neg_view(made.conj()), "neg": torch._neg_view(made), "conj": made.conj()}
    assert_as_torch(saved(tmp_path / "m.pth", state))
    assert_as_torch(saved(tmp_path / "m.pth", {"imag": made.conj().imag}))


def test_showing_conjugated_tensors(cli: Cli, folder: Path) -> None:
    """The values are 1-2j and not 1+2j, and every command names the conjugated tensors."""
    path = saved(folder / "m.pth", {"w": torch.tensor([1 + 2j], dtype=torch.complex64).conj(), "v": torch.ones(2)})
    assert [row["name"] for row in cli("params", path, "--json").json["tensors"]] == ["w", "v"]
    assert "1-2j" in cli("params", path, "--values").out
    for command in ("summary", "modules", "params"):
        cli(command, path)
    cli(*guards(path))
    cli("save", "o.pth", "-m", path)
    again = torch.load(folder / "o.pth", weights_only=True)
    assert again["w"].tolist() == [1 - 2j]
    assert not again["w"].is_conj()
    cli("diff", path, "o.pth")


def test_a_negated_tensor_without_a_sign_bit_is_refused(cli: Cli, folder: Path) -> None:
    marked = tensor(storage="torch.IntStorage")[:-2] + b"}" + text("neg") + b"\x88stR"
    path = packed(folder / "m.pth", state_dict(("w", marked), ("v", ANOTHER)))
    assert torch.load(path, weights_only=True)["w"].is_neg()
    assert [row["name"] for row in cli("params", path, "--json").json["tensors"]] == ["w", "v"]
    assert "is stored with a neg flag" in cli("params", path, "--values", code=4).err
    cli("params", path, "-s", "v", "--values")


@pytest.mark.parametrize("value", [b"\x88", b"\x89", b"K\x01"])
def test_a_conj_or_neg_mark_applies_whatever_its_value(tmp_path: Path, value: bytes) -> None:
    """torch's C++ code does the same: `{"conj": False}` conjugates."""
    marked = tensor((1,), storage="torch.ComplexFloatStorage", count=1)[:-2] + b"}" + text("conj") + value + b"stR"
    path = packed(tmp_path / "m.pth", state_dict(("w", marked)))
    assert_as_torch(path)
    assert torch.load(path, weights_only=True)["w"].tolist() == [1 - 2j]


def test_parts_of_resolved_bytes(tmp_path: Path) -> None:
    """A part may start at any byte, because a window or a chunk may start inside an element."""
    path = saved(tmp_path / "m.pth", {"w": torch.arange(8).to(torch.complex64).mul(1 + 1j).conj()})
    storage = checkpoints.read(path).tensors["w"].storage
    assert isinstance(storage, conj_and_neg.Resolved)
    whole = storage.bytes()
    for start in range(20):
        for length in (0, 1, 7, 30):
            part = storage.part(start, length)
            assert part.bytes() == whole[start : start + length] == bytes(part.mapped()) == b"".join(part.chunks())
            assert part.part(0, length).nbytes == length


# --- tensors made by other calls -----------------------------------------------------------------------------------


def called(dotted: str, *args: bytes) -> bytes:
    return name(dotted) + b"(" + b"".join(args) + b"tR"


NUMBERS = b"](" + b"G" + struct.pack(">d", float("nan")) + b"G" + struct.pack(">d", 2.0) + b"e"


@pytest.mark.parametrize(
    "made",
    [
        called("torch.Tensor", NUMBERS),
        called("torch.FloatTensor", NUMBERS),
        name("torch.Tensor") + NUMBERS + b"\x85\x81",
        called("torch.nn.parameter.Parameter"),
        called("torch._utils._rebuild_parameter", called("torch.Tensor", NUMBERS), GRAD, HOOKS),
        called(
            "torch._utils._rebuild_device_tensor_from_cpu_tensor",
            *(ANOTHER, name("torch.float64"), text("cpu"), b"\x89"),
        ),
    ],
    ids=["Tensor", "FloatTensor", "a new Tensor", "Parameter()", "a parameter of one", "of another dtype"],
)
def test_an_unreadable_tensor_fails_each_check(cli: Cli, folder: Path, made: bytes) -> None:
    """It has no row, so no check may pass; or the whole file is refused."""
    path = packed(folder / "m.pth", state_dict(("v", tensor()), ("w", made)))
    assert isinstance(torch.load(path, weights_only=True)["w"], torch.Tensor)
    packed(folder / "v.pth", state_dict(("v", tensor())))
    for guard in (("--finite",), ("--max-params", "100"), ("--max-bytes", "1G"), ("--dtype", "float32")):
        result = cli("check", path, *guard, code=cli_code(path, 1))
        assert "w cannot be" in result.out or result.err.startswith("error: ")
    cli("check", path, "--absent", "w", code=cli_code(path, 1))
    cli("check", path, "--absent", "x", code=cli_code(path, 0))
    cli("check", path, "--same-as", "v.pth", code=cli_code(path, 1))
    cli("diff", path, path, code=cli_code(path, 1))


def test_an_unreadable_parameter_does_not_count_as_frozen(cli: Cli, folder: Path) -> None:
    trained = parameter(called("torch.Tensor", NUMBERS))
    path = packed(folder / "m.pth", state_dict(("v", parameter(tensor(), b"\x89")), ("w", trained)))
    assert torch.load(path, weights_only=True)["w"].requires_grad
    cli("check", path, "--frozen", "v")
    assert "modelcli does not know whether w is frozen" in cli("check", path, "--frozen", "**", code=1).out


def test_an_unreadable_tensor_in_a_shard_fails_the_folder(cli: Cli, folder: Path) -> None:
    packed(folder / "a.bin", state_dict(("v", tensor()), ("w", called("torch.Tensor", NUMBERS))))
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"v": "a.bin"}}), encoding="ascii")
    assert "w cannot be" in cli("check", folder, "--finite", code=1).out


def cli_code(path: Path, code: int) -> int:
    """Return 4 if the whole file is refused, and otherwise `code`."""
    try:
        checkpoints.read(path)
    except FileFormatError:
        return 4
    return code


def test_a_tensor_of_another_device_has_a_row(tmp_path: Path) -> None:
    made = called(
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        *(tensor(), name("torch.float32"), text("cpu"), GRAD),
    )
    assert assert_as_torch(packed(tmp_path / "m.pth", state_dict(("w", made)))).tensors["w"].requires_grad


@pytest.mark.parametrize("function", ["v2", "v3"])
def test_a_rebuild_with_other_arguments_is_refused(tmp_path: Path, function: str) -> None:
    more = b"" if function == "v2" else name("torch.float32")
    made = tensor(rebuild=f"torch._utils._rebuild_tensor_{function}")[:-2] + more
    for extra in (b"NN", b"K\x01"):
        assert_refused(packed(tmp_path / "m.pth", state_dict(("w", made + extra + b"tR"))), "never writes|not a")


def test_a_list_that_is_changed_afterwards_changes_no_tensor(tmp_path: Path) -> None:
    """torch creates the tensor at the call, so later changes of the list have no effect."""
    meta = name("torch._utils._rebuild_meta_tensor_no_storage") + b"(" + name("torch.float32")
    made = meta + b"]q\x07K\x02a](K\x01e\x89tR"
    later = state_dict(("w", made), ("x", b"h\x07K\x03a"))
    path = packed(tmp_path / "m.pth", later)
    assert torch.load(path, weights_only=True)["w"].shape == (2,)
    assert checkpoints.read(path).tensors["w"].shape == (2,)


# --- places, sizes and dtypes of storages --------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["zip", "legacy"])
def test_a_storage_of_the_meta_device_has_no_values(cli: Cli, folder: Path, protocol: str) -> None:
    pickled = state_dict(("w", tensor().replace(text("cpu"), text("meta"))))
    if protocol == "zip":
        path = packed(folder / "m.pth", pickled)
        assert torch.load(path, weights_only=True)["w"].is_meta
    else:
        path = folder / "m.pth"
        path.write_bytes(legacy(pickled))
    (row,) = cli("params", path, "--values", "--json").json["tensors"]
    assert (row["shape"], row["values"]) == ([2], None)
    assert "w cannot be looked at" in cli("check", path, "--finite", code=1).out


@pytest.mark.parametrize("location", [text("meta:0"), text("nowhere at all"), b"N", text("")])
def test_a_storage_with_an_invalid_device_is_refused(tmp_path: Path, location: bytes) -> None:
    path = packed(tmp_path / "m.pth", state_dict(("w", tensor().replace(text("cpu"), location))))
    with pytest.raises((RuntimeError, AttributeError, TypeError)):
        torch.load(path, weights_only=True)
    assert_refused(path, "not a device of torch")


def test_a_tensor_beyond_the_size_that_its_storage_states_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "m.pth", state_dict(("w", tensor(count=1))))
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)
    assert_refused(path, "its storage holds 4")


def test_a_storage_with_two_sizes_is_refused(tmp_path: Path) -> None:
    pickled = state_dict(("w", tensor()), ("v", tensor((1,), count=1)))
    assert_refused(packed(tmp_path / "m.pth", pickled), "two sizes")


def test_the_length_of_old_storages(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(legacy(state_dict(("w", tensor((1,), count=1)))))
    assert_refused(path, "should have 4 bytes, but has 8")
    path.write_bytes(legacy(order=b"\x80\x02](" + text("0") + text("0") + b"e."))
    assert_refused(path, "names one of them twice")


def test_a_part_of_an_old_storage_with_the_key_of_another_is_refused(tmp_path: Path) -> None:
    def part(own: str, offset: int) -> bytes:
        view = b"(" + text(own) + number(offset) + number(1) + b"t"
        return tensor((1,)).replace(number(2) + b"tQ", number(2) + view + b"tQ")

    path = tmp_path / "m.pth"
    path.write_bytes(legacy(state_dict(("w", part("7", 0)), ("v", part("8", 1)))))
    assert [entry.offset for entry in checkpoints.read(path).tensors.values()] == [0, 1]
    for other in (part("7", 1), tensor(key=text("7"))):
        path.write_bytes(legacy(state_dict(("w", part("7", 0)), ("v", other))))
        assert_refused(path, "two storages have the key|both for a storage and for a part")


def test_bytes_of_one_dtype_as_another(tmp_path: Path) -> None:
    """`_rebuild_tensor_v3` may reinterpret a typed storage; offsets count elements of the tensor's dtype."""
    made = tensor((2,), offset=1, rebuild="torch._utils._rebuild_tensor_v3")[:-2] + name("torch.int16") + b"tR"
    assert_as_torch(packed(tmp_path / "m.pth", state_dict(("w", made))))


# --- texts, names and numbers --------------------------------------------------------------------------------------


def test_a_text_of_python_2_is_utf_8(cli: Cli, folder: Path) -> None:
    path = packed(folder / "m.pth", b"\x80\x02}(U\x02\xc3\xa9" + tensor() + b"u.")
    assert list(assert_as_torch(path).tensors) == ["é"]
    assert "é" in cli("params", path).out
    packed(path, b"\x80\x02}(U\x01\xe9" + tensor() + b"u.")
    with pytest.raises(UnicodeDecodeError):
        torch.load(path, weights_only=True)
    assert_refused(path, "is damaged")


@pytest.mark.parametrize(
    ("opcode", "found"),
    [
        (b"T\x02\0\0\0\xc3\xa9", "é"), (b"S'\\xc3\\xa9'\n", "é"), (b"V\\u00e9\n", "é"), (b"\x8c\x02\xc3\xa9", "é"),
        (b"I7\n", 7), (b"I01\n", True), (b"I00\n", False), (b"L7L\n", 7), (b"F1e3\n", 1000.0), (b"F-inf\n", -1e999),
    ],
)  # fmt: skip
def test_opcodes_of_other_protocols_mean_what_python_reads(opcode: bytes, found: Any) -> None:
    data = opcode + b"."
    assert pickle.loads(data, encoding="utf-8") == found
    value = pickles.read(data, "made").value
    assert (value, type(value)) == (found, type(found))


@pytest.mark.parametrize("opcode", [b"I010\n", b"I0x10\n", b"I1_0\n", b"L010L\n", b"F1_0\n", b"I 7\n", b"S\\x41\n"])
def test_numbers_that_readers_disagree_about_are_refused(opcode: bytes) -> None:
    with pytest.raises(FileFormatError, match="is damaged"):
        pickles.read(opcode + b".", "made")


def test_escapes_in_class_names_are_not_interpreted() -> None:
    """`pickletools` interprets escapes in class names, and unpicklers do not."""
    found = pickles.read(b"cos\nsys\\x74em\n.", "made")
    assert found.foreign == ("os.sys\\x74em",)


def test_a_frame_ends_between_two_opcodes() -> None:
    """If a frame cuts an opcode in two, Python's reader drops its start and finds another name."""
    whole = pickle.dumps({"a": 1, "b": [2.5, "x"]}, protocol=4)
    assert pickles.read(whole, "made").value == {"a": 1, "b": [2.5, "x"]}
    for length in (len(whole) - 8, len(whole) - 4, 2**62):
        with pytest.raises(FileFormatError, match="frame"):
            pickles.read(
                whole[:3] + struct.pack("<Q", length) + whole[11:-2] + b"ctorch\nfloat32\n0" + whole[-2:], "made"
            )


def test_no_opcode_takes_values_below_a_mark() -> None:
    for data in (b"\x80\x02K\x01(0.", b"\x80\x02K\x01(\x85.", b"\x80\x02K\x01(q\x00.", b"\x80\x02K\x01(2."):
        with pytest.raises((IndexError, pickle.UnpicklingError)):
            torch._weights_only_unpickler.load(io.BytesIO(data))
    for data in (b"\x80\x02K\x01(\x85.", b"\x80\x02K\x01(q\x00.", b"\x80\x02K\x01(2.", b"\x80\x02]K\x01(a."):
        with pytest.raises(FileFormatError):
            pickles.read(data, "made")


def test_calling_the_result_of_a_call_is_foreign() -> None:
    device = name("torch.device") + b"(" + text("cpu") + b"tR"
    assert pickles.read(b"\x80\x02" + device + b"(NtR.", "made").foreign == ("torch.device",)


# --- zip archives --------------------------------------------------------------------------------------------------


def entry_of(title: str, data: bytes, *, flags: int = 0, attributes: int = 0) -> tuple[bytes, bytes]:
    """Return a stored record, and its directory entry up to the offset."""
    import zlib

    raw_name, crc = title.encode(), zlib.crc32(data)
    fields = struct.pack("<2H2H3L2H", flags, 0, 0, 0x21, crc, len(data), len(data), len(raw_name), 0)
    local = b"PK\x03\x04" + struct.pack("<H", 20) + fields + raw_name + data
    return local, struct.pack("<4s2H", b"PK\x01\x02", 20, 20) + fields + struct.pack("<3HL", 0, 0, 0, attributes)


def with_records(path: Path, *records: tuple[str, bytes, int, int], pickled: bytes = hostile.GOOD) -> Path:
    """Write the good archive with more records, each given by name, bytes, flags and attributes."""
    taken = hostile.parts(archive(pickled))
    made, entries = taken.records, list(taken.entries)
    for title, data, flags, attributes in records:
        local, entry = entry_of(title, data, flags=flags, attributes=attributes)
        entries.append(entry + struct.pack("<L", len(made)) + title.encode())
        made += local
    path.write_bytes(hostile.Parts(made, entries, b"").joined())
    return path


def test_archives_made_here_are_good(tmp_path: Path) -> None:
    path = with_records(tmp_path / "m.pth", ("archive/more", b"x", 0x800, 0), ("archive/folder/", b"", 0, 0x10))
    assert zipfile.ZipFile(path).testzip() is None
    assert_as_torch(path)


def test_one_raw_name_with_and_without_the_flag_of_utf_8_is_refused(tmp_path: Path) -> None:
    path = with_records(tmp_path / "m.pth", ("archive/é", b"x", 0x800, 0), ("archive/é", b"y", 0, 0))
    assert len(set(zipfile.ZipFile(path).namelist())) == 6  # two names for Python, and one for torch
    assert_refused(path, "twice")


def test_a_prefix_without_the_flag_of_utf_8(tmp_path: Path) -> None:
    """torch compares bytes, so the folder of an archive may have any name."""
    path = saved(tmp_path / "modèle.pth", {"w": torch.ones(2)})
    assert_as_torch(path)
    taken = hostile.parts(path.read_bytes())
    entries = [entry[:8] + b"\0\0" + entry[10:] for entry in taken.entries]
    path.write_bytes(hostile.Parts(taken.records, entries, b"").joined())
    assert torch.load(path, weights_only=True)["w"].tolist() == [1, 1]
    with pytest.raises(FileFormatError, match="contradicts the directory"):
        checkpoints.read(path)


@pytest.mark.parametrize("key", ["0\0evil", "0\0"])
def test_a_key_with_a_nul_is_refused(tmp_path: Path, key: str) -> None:
    pickled = state_dict(("w", tensor(key=text(key))))
    path = packed(tmp_path / "m.pth", pickled)
    assert torch.load(path, weights_only=True)["w"].tolist() == [1, 2]  # of the record 0
    assert_refused(path, "persistent id")
    assert_refused(with_records(path, (f"archive/data/{key}", OTHER, 0, 0), pickled=pickled), "NUL|persistent id")
    assert_refused(with_records(path, (f"archive/data/{key}", OTHER, 0, 0)), "NUL")


def test_a_byte_order_record_with_a_name_in_capitals_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "m.pth", hostile.GOOD)
    data = path.read_bytes().replace(b"archive/byteorder", b"archive/BYTEORDER")
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    assert_refused(path, "should have the name archive/byteorder")


@pytest.mark.parametrize("order", [b"", b"LITTLE", b"middle"])
def test_an_invalid_byte_order_is_refused(tmp_path: Path, order: bytes) -> None:
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(path, "w") as made:
        for title, data in (("data.pkl", hostile.GOOD), ("byteorder", order), ("data/0", ONE), ("version", b"3\n")):
            made.writestr(f"a/{title}", data)
    with pytest.raises(ValueError, match="endianness"):
        torch.load(path, weights_only=True)
    assert_refused(path, "byteorder is")


@pytest.mark.parametrize(
    ("title", "attributes"), [("archive/data/1", 0x10), ("archive/data/1/", 0), ("archive/x/", 0x10)]
)
def test_a_record_that_is_marked_as_a_folder_is_refused(tmp_path: Path, title: str, attributes: int) -> None:
    pickled = state_dict(("w", tensor()), ("v", ANOTHER))
    assert_refused(with_records(tmp_path / "m.pth", (title, OTHER, 0, attributes), pickled=pickled), "folder")


# --- files of two formats, and of several pickles ------------------------------------------------------------------


def tar_of(start: bytes) -> bytes:
    """Return a tar archive as torch wrote it before 0.1.10. Its first name begins like another format."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as made:
        for title in ("first", "storages", "tensors", "pickle"):
            data = b"\x80\x02K\x00."
            info = tarfile.TarInfo(title)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    block = bytearray(out.getvalue())
    block[: len(start)] = start
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


@pytest.mark.parametrize("magic", [True, False], ids=["ustar", "before ustar"])
def test_a_tar_and_a_legacy_pickle_at_once_is_refused(tmp_path: Path, magic: bool) -> None:
    whole = legacy()
    start = whole[:90]
    data = bytearray(tar_of(start))
    if not magic:
        data[257:265] = bytes(8)
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    path = tmp_path / "m.pth"
    path.write_bytes(bytes(data))
    assert tarfile.is_tarfile(path)
    assert_refused(path, "tar archive")


def test_a_whole_legacy_pickle_in_the_name_of_a_tar(tmp_path: Path) -> None:
    """torch opens the tar, so a whole legacy pickle inside its first name must not be read instead."""
    small = b"\x80\x02}" + text("w") + name("torch._utils._rebuild_tensor_v2") + b"N\x862."
    path = tmp_path / "m.pth"
    path.write_bytes(tar_of(hostile.legacy(small)[:100]))
    with pytest.raises(RuntimeError, match=r"legacy \.tar"):
        torch.load(path, weights_only=True)
    assert_refused(path, "tar archive")


@pytest.mark.parametrize("kind", ["legacy", "safetensors"])
def test_a_checkpoint_that_ends_as_a_zip_archive_is_refused(tmp_path: Path, kind: str) -> None:
    inside = archive(records={"data/0": bytes(8)})
    if kind == "legacy":
        data = legacy() + inside
    else:
        header = {"w": {"dtype": "U8", "shape": [len(inside)], "data_offsets": [0, len(inside)]}}
        data = hostile.safetensors(header, inside)
    path = tmp_path / "m.pth"
    path.write_bytes(data)
    assert zipfile.is_zipfile(path)
    assert_refused(path, "both a checkpoint and a zip archive")


FOREIGN = name("os.system")


@pytest.mark.parametrize("place", ["start", "protocol", "system", "values", "list"])
def test_foreign_names_count_in_each_pickle_of_an_old_file(cli: Cli, folder: Path, place: str) -> None:
    whole = legacy()
    pickled = {
        "protocol": (b"\x80\x02M\xe9\x03.", b"\x80\x02" + FOREIGN + b"0M\xe9\x03."),
        "system": (b"\x80\x02}(" + text("little_endian") + b"\x88u.", b"\x80\x02}(" + text("x") + FOREIGN + b"u."),
        "values": (text("a.weight"), text("x") + FOREIGN + text("a.weight")),
        "list": (b"\x80\x02](" + text("0") + b"e.", b"\x80\x02" + FOREIGN + b"0](" + text("0") + b"e."),
    }
    path = folder / "m.pth"
    if place == "start":
        magic = whole[2:15]
        path.write_bytes(b"\x80\x02cq\nfoo\n00"[:2] + b"cos\nexec\n0"[:9] + magic + whole[15:])
        assert b"cos\nexec\n" in path.read_bytes()
    else:
        path.write_bytes(whole.replace(*pickled[place]))
    assert path.read_bytes() != whole
    result = cli("check", path, "--safe", code=1)
    assert "os." in result.out
    assert "none was loaded" in cli("params", path).err
    cli("save", "o.pth", "-m", path, code=3)


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def distributed(folder: Path) -> Path:
    from torch.distributed.checkpoint.state_dict_saver import save

    with pytest.warns(UserWarning, match="single process"):
        save({"w": torch.ones(2)}, checkpoint_id=folder / "d")
    return folder / "d"


def test_an_attribute_of_an_enum_is_one_of_its_members(cli: Cli, folder: Path, distributed: Path) -> None:
    """`getattr` may only access a member of an enum."""
    path = distributed / ".metadata"
    enum = "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"
    original = path.read_bytes()
    for attribute, code in (("TORCH_CONTIGUOUS_FORMAT", 0), ("__globals__", 1), ("from_bytes", 1)):
        reached = called("builtins.getattr", name(enum), text(attribute))
        path.write_bytes(b"\x80\x02" + reached + b"0" + original[2:])
        cli("check", distributed, "--safe", code=code)


def test_both_checkpoints_of_a_folder_are_checked(cli: Cli, folder: Path, distributed: Path) -> None:
    torch.save({"w": torch.ones(2)}, distributed / "a.bin")
    index, metadata = distributed / "pytorch_model.bin.index.json", distributed / ".metadata"
    index.write_text(json.dumps({"weight_map": {"w": "a.bin"}}), encoding="ascii")
    for path in (distributed, index, metadata):
        cli("check", path, "--safe")
    metadata.write_bytes(b"\x80\x02" + FOREIGN + b"0" + metadata.read_bytes()[2:])
    for path in (distributed, index, metadata):
        assert "os.system" in cli("check", path, "--safe", code=1).out


def test_files_beside_an_index_decide_its_safety(cli: Cli, folder: Path) -> None:
    """Another program may load the other index or the `.metadata` of the folder."""
    torch.save({"w": torch.ones(2)}, "a.bin")
    for number_, extra in enumerate(({}, {"x": Path("y")})):
        torch.save({"w": torch.ones(2)} | extra, f"{number_}.bin")
        document = {"weight_map": {"w": f"{number_}.bin"}}
        Path(f"{number_}.index.json").write_text(json.dumps(document), encoding="ascii")
    assert "athlib" in cli("check", "0.index.json", "--safe", code=1).out
    torch.save({"w": torch.ones(2)}, "1.bin")
    cli("check", "0.index.json", "--safe")
    Path("1.bin").unlink()
    assert "1.index.json beside it cannot be looked at" in cli("check", "0.index.json", "--safe", code=1).out
    shutil.copy("1.index.json", ".metadata")
    Path("1.index.json").unlink()
    assert ".metadata beside it" in cli("check", "0.index.json", "--safe", code=1).out


# --- inputs without end --------------------------------------------------------------------------------------------

#: Inputs for each format in the tests; `make fuzz` runs a million.
INPUTS = 600
_ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="it forks, and limits memory as Linux does")


@_ON_LINUX
@pytest.mark.parametrize("form", agreement.every(), ids=lambda form: form.name)
def test_both_readers_give_the_same_result(form: agreement.Format) -> None:
    """They agree in names, shapes, dtypes, strides, values and flags: see `tests.fuzz.agreement`."""
    outcome = agreement.run(form, INPUTS, seed=1)
    assert outcome.faults == []
    assert outcome.inputs == INPUTS
    # torch loads no tar with `weights_only`, so modelcli must not either.
    assert outcome.both > INPUTS // 100 or form.name.startswith("tar")


def _form(*oracles: Callable[[Path], Any]) -> agreement.Format:
    good = archive()
    return agreement.Format("made", lambda _draw: good, oracles)


@_ON_LINUX
def test_the_comparison_finds_differences() -> None:
    good = torch.tensor([0.0, 0.0])
    for other in (good + 1, good.double(), good[:1], good.reshape(1, 2), torch.zeros(4)[::2], nn.Parameter(good)):
        outcome = agreement.run(_form(lambda _path, other=other: {"a.weight": other}), 1, seed=0)  # type: ignore[misc]
        assert len(outcome.faults) == 1, other
    for value in ({"b": good}, {"a.weight": good, "b": good}, {"a.weight": good, "b": [good]}, {"a.weight": 1}, [good]):
        outcome = agreement.run(_form(lambda _path, value=value: value), 1, seed=0)  # type: ignore[misc]
        assert len(outcome.faults) == 1, value
    assert agreement.run(_form(lambda _path: {"a.weight": good}), 3, seed=0) == agreement.Outcome(3, 3)


@_ON_LINUX
def test_a_crash_of_another_reader_counts_as_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes(_path: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    assert agreement.run(_form(crashes), 2, seed=0) == agreement.Outcome(2, 0, 2)
    monkeypatch.setattr("tests.fuzz.agreement.checkpoints.read", crashes)
    assert "modelcli's reader ended" in agreement.run(_form(), 1, seed=0).faults[0]


@_ON_LINUX
def test_a_name_that_torch_refuses_has_to_be_foreign() -> None:
    def refuses(_path: Path) -> None:
        raise pickle.UnpicklingError("Unsupported global: os.system")

    assert "is not foreign" in agreement.run(_form(refuses), 1, seed=0).faults[0]
