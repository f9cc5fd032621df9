"""Checks such as `--finite` fail on every value that they cannot check: clashing names, tensors outside the state dict.

Each file contains a NaN at another place. `torch.load` shows that it is there.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import Cli
from tests.hostile import archive, name, state_dict, tensor, text
from tests.needs import needs_torch

FINE, WRONG = torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 1.0])


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it-ran",)


def with_attributes(**attributes: Any) -> OrderedDict[str, Any]:
    state_dict: OrderedDict[str, Any] = OrderedDict(w=FINE)
    state_dict.__dict__.update(attributes)
    return state_dict


def module(**attributes: Any) -> nn.Module:
    made = nn.Linear(2, 2)
    made.__dict__.update(attributes)
    return made


def with_buffer() -> nn.Module:
    made = nn.Linear(2, 2)
    made.register_buffer("scratch", WRONG, persistent=False)
    return made


def in_the_dict_of_an_entry() -> dict[str, Any]:
    inner: OrderedDict[str, Any] = OrderedDict()
    inner.__dict__["told"] = WRONG
    return {"w": FINE, "more": inner}


@pytest.mark.parametrize(
    "value",
    [
        {"a": [FINE], "a[0]": WRONG, "b": FINE},
        {"a[0]": WRONG, "a": [FINE]},
        {"a": {"b": FINE}, "a['b']": WRONG},
        {"w": FINE, "a": [[WRONG]], "a[0]": [FINE]},
        {"w": FINE, "a[0]": [FINE], "a": [[WRONG]]},
        {"tower": {"x": FINE, "y": FINE}, "w": WRONG},
        with_attributes(told=WRONG),
        with_attributes(_metadata={"": {"told": WRONG}}),
        in_the_dict_of_an_entry(),
        module(told=WRONG),
        module(told={(1, 2): WRONG}),
        module(told=WRONG.untyped_storage()),
        with_buffer(),
    ],
    ids=[
        "list, same name",
        "list, same name first",
        "dict, same name",
        "two lists",
        "two lists, turned round",
        "beside a guess",
        "attribute of the dict",
        "metadata",
        "attribute of a dict in it",
        "attribute of a module",
        "by a tuple",
        "a storage",
        "a buffer that no state dict has",
    ],
)
def test_a_nan_in_a_tensor_without_a_row_fails(cli: Cli, folder: Path, value: Any) -> None:
    torch.save(value, "m.pth")
    found = cli("check", "m.pth", "--finite", "--json", code=1).json["checks"]
    assert [row["passed"] for row in found] == [False]


def test_names_that_clash_are_not_compared(cli: Cli, folder: Path) -> None:
    torch.save({"a": [FINE], "a[0]": FINE}, "one.pth")
    torch.save({"a": [WRONG], "a[0]": FINE}, "other.pth")
    cli("diff", "one.pth", "other.pth", code=1)
    cli("check", "one.pth", "--same-as", "other.pth", code=1)


def test_tensors_beside_the_state_dict_are_ignored_with_key(cli: Cli, folder: Path) -> None:
    torch.save({"tower": {"x": FINE, "y": FINE}, "w": WRONG}, "m.pth")
    cli("check", "m.pth", "--finite", "--key", "tower")
    torch.save({"model": {"x": FINE}, "rng_state": torch.get_rng_state()}, "trained.pth")
    cli("check", "trained.pth", "--finite")


@pytest.mark.parametrize("attribute", ["keys", "items", "copy", "get", "__class__"])
def test_an_attribute_that_hides_a_method_of_a_dict_is_refused(cli: Cli, folder: Path, attribute: str) -> None:
    state_dict = with_attributes(extra=OrderedDict)
    torch.save(state_dict, "m.pth")
    plain = Path("m.pth").read_bytes()
    cli("check", "m.pth", "--finite")
    torch.save(with_attributes(**{attribute: OrderedDict}) if attribute != "items" else state_dict, "m.pth")
    if attribute == "items":  # torch.save itself would call it
        Path("m.pth").write_bytes(without_checksum(plain, b"extra", b"items"))
    assert attribute in torch.load("m.pth", weights_only=True).__dict__
    assert repr(attribute) in cli("check", "m.pth", "--finite", "--json", code=4).error["message"]


def without_checksum(archive: bytes, before: bytes, after: bytes) -> bytes:
    """Return an archive whose pickle has some bytes replaced by others of the same length, with a new checksum."""
    import io
    import zipfile

    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(before, after))
    return made.getvalue()


def test_a_module_whose_name_is_not_text_is_refused(cli: Cli, folder: Path) -> None:
    made = nn.Linear(2, 2)
    made._buffers[0] = WRONG  # type: ignore[index]
    torch.save(made, "m.pth")
    cli("check", "m.pth", "--finite", code=3)


# --- folders -------------------------------------------------------------------------------------------------------


def index(name: str, **files: str) -> None:
    Path(name).write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("whole", ["pytorch_model.bin", "model.safetensors"])
def test_an_index_beside_a_single_file_is_ambiguous(cli: Cli, folder: Path, whole: str) -> None:
    torch.save({"w": FINE}, "part.bin")
    index("pytorch_model.bin.index.json", w="part.bin")
    if whole.endswith(".bin"):
        torch.save({"w": WRONG, "payload": Payload()}, whole)
    else:
        save_file({"w": WRONG}, whole)
    error = cli("check", "./", "--finite", "--json", code=2).error
    assert whole in error["hint"]
    cli("check", "pytorch_model.bin.index.json", "--finite")


def test_files_that_libraries_load_instead_of_an_index_decide_safety(cli: Cli, folder: Path) -> None:
    save_file({"w": FINE}, "part.safetensors")
    index("model.safetensors.index.json", w="part.safetensors")
    cli("check", "model.safetensors.index.json", "--safe")
    torch.save({"w": FINE, "payload": Payload()}, "pytorch_model.bin")
    cli("check", "model.safetensors.index.json", "--safe", code=1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"v": FINE, "w": WRONG}, {"w": FINE}),
        ({"v": FINE, "more": [WRONG]}, {"w": FINE, "more": [FINE]}),
        ({"v": FINE, "more[0]": WRONG}, {"w": FINE, "more": [FINE]}),
    ],
    ids=["tensor", "entry", "tensor in an entry"],
)
def test_a_name_in_two_shards_is_refused(cli: Cli, folder: Path, one: Any, other: Any) -> None:
    torch.save(one, "1.bin")
    torch.save(other, "2.bin")
    named = {name: "1.bin" for name in one if name != "w"} | {"w": "2.bin"}
    named.pop("more", None)
    index("pytorch_model.bin.index.json", **named)
    assert "two shards have" in cli("check", "./", "--finite", "--json", code=4).error["message"]


def test_a_training_checkpoint_is_not_a_valid_shard(cli: Cli, folder: Path) -> None:
    torch.save({"state_dict": {"w": FINE}, "w": WRONG}, "1.bin")
    index("pytorch_model.bin.index.json", w="1.bin")
    cli("check", "./", "--finite", code=4)


# --- dtypes and programs -------------------------------------------------------------------------------------------


WITH_INFINITIES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e5m2", "complex128", "complex64", "complex32"),
)
WITH_NAN = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        *((dtype, wrong) for dtype in WITH_INFINITIES for wrong in ("nan", "inf")),
        *(pytest.param(dtype, "nan", marks=needs_torch(dtype)) for dtype in WITH_NAN),
    ],
)
def test_non_finite_values_fail_in_every_dtype(cli: Cli, folder: Path, dtype: str, wrong: str) -> None:
    tensor = torch.tensor([1.0, float(wrong)]).to(getattr(torch, dtype))
    assert not tensor.to(torch.complex128).isfinite().all()
    torch.save({"w": tensor}, "m.pth")
    cli("check", "m.pth", "--finite", code=1)


class Program(nn.Module):
    """A module that adds a constant to the output of a layer."""

    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        vars(self).update(kept)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class WithTensor(Program):
    def __init__(self) -> None:
        super().__init__(kept=WRONG)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.kept


class WithDict(Program):
    def __init__(self) -> None:
        super().__init__(kept={"a": WRONG})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.kept["a"]


class WithConstant(Program):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + WRONG


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["attribute", "dict", "constant", "frozen"])
def test_a_nan_outside_the_state_dict_of_torchscript_fails(cli: Cli, folder: Path, kind: str) -> None:
    made = {"attribute": WithTensor, "dict": WithDict, "constant": WithConstant, "frozen": WithTensor}[kind]().eval()
    program = torch.jit.trace(made, FINE) if kind == "constant" else torch.jit.script(made)
    torch.jit.save(torch.jit.freeze(program) if kind == "frozen" else program, "m.pt")
    cli("check", "m.pt", "--finite", code=1)


@pytest.mark.filterwarnings("ignore")
def test_programs_without_constants_are_finite(cli: Cli, folder: Path) -> None:
    torch.jit.save(torch.jit.script(Program()), "m.pt")
    cli("check", "m.pt", "--finite")
    torch.export.save(torch.export.export(Program(), (FINE,)), "m.pt2")
    cli("check", "m.pt2", "--finite")


def test_a_nan_outside_the_state_dict_of_an_exported_program_fails(cli: Cli, folder: Path) -> None:
    torch.export.save(torch.export.export(WithTensor(), (FINE,)), "m.pt2")
    cli("check", "m.pt2", "--finite", code=1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_tensors_in_lists_beside_numbers_are_checked(cli: Cli, folder: Path) -> None:
    class Listing(nn.Module):
        def __init__(self, tensors: list[torch.Tensor]) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)
            self.sizes, self.scales = [1, 2], [0.5]
            self.tensors = tensors

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.scales[0] + self.sizes[0] + self.tensors[0]

    class Plain(Listing):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.scales[0] + self.sizes[0]

    torch.jit.script(Listing([WRONG])).save("listing.pt")
    plain = Plain([])
    del plain.tensors
    torch.jit.script(plain).save("plain.pt")
    assert "tensors" in cli("check", "listing.pt", "--finite", "--json", code=1).json["checks"][0]["found"]
    cli("check", "plain.pt", "--finite")


# --- numbers and hooks ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("nan", [complex(1, float("nan")), complex(float("nan"), 1)], ids=["imaginary", "real"])
def test_a_nan_in_one_part_hides_no_difference_in_the_other(
    cli: Cli, folder: Path, dtype: torch.dtype, nan: complex
) -> None:
    torch.save({"w": torch.tensor([nan], dtype=dtype)}, "one.pth")
    torch.save({"w": torch.tensor([nan * 2], dtype=dtype)}, "other.pth")
    torch.save({"w": torch.tensor([[nan, 7]], dtype=dtype)[:, 0]}, "same.pth")
    cli("diff", "one.pth", "other.pth", code=1)
    cli("check", "one.pth", "--same-as", "other.pth", code=1)
    cli("diff", "one.pth", "same.pth")


@pytest.mark.parametrize("parameter", [True, False])
def test_hooks_of_a_tensor_are_refused(cli: Cli, folder: Path, parameter: bool) -> None:
    hooks = name("collections.OrderedDict") + b")R"
    filled = hooks + text("x") + tensor() + b"s"
    plain = tensor().removesuffix(hooks + b"tR")
    made = name("torch._utils._rebuild_parameter") + b"(" + tensor() + b"\x88%stR" if parameter else plain + b"%stR"
    for given, code in ((hooks, 0), (filled, 4)):
        pickled = state_dict(("w", made.replace(b"%s", given)))
        Path("m.pth").write_bytes(archive(pickled, {"data/0": FINE.numpy().tobytes()}))
        assert list(torch.load("m.pth", weights_only=True)) == ["w"]
        cli("check", "m.pth", "--finite", code=code)


# --- names and flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [1, [FINE.clone()], {"a": FINE.clone()}, "text"], ids=["number", "list", "dict", "text"]
)
def test_an_entry_that_is_not_a_tensor_counts_as_present(cli: Cli, folder: Path, value: Any) -> None:
    torch.save({"w": FINE, "secret": value}, "m.pth")
    cli("check", "m.pth", "--absent", "secret", code=1)
    cli("check", "m.pth", "--absent", "other")


def test_a_trainable_tensor_with_the_name_of_a_buffer_is_a_parameter(cli: Cli, folder: Path) -> None:
    frozen = nn.Parameter(FINE.clone(), requires_grad=False)
    torch.save({"w": frozen, "x.running_mean": FINE.clone().requires_grad_()}, "m.pth")
    cli("check", "m.pth", "--frozen", "**", code=1)


@pytest.mark.parametrize("name", [".weight.weight", "a..b", "..", "a."])
def test_the_record_of_a_file_with_empty_path_components_is_valid(cli: Cli, folder: Path, name: str) -> None:
    torch.save({name: FINE}, "m.pth")
    cli("save", "out.pth", "-m", "m.pth")
    assert "ignored" not in cli("params", "out.pth").err


@pytest.mark.parametrize("field", [r'"a\ud800": "x"', r'"a": "\uDC00"', '"a": NaN'])
def test_a_header_that_safetensors_refuses_is_refused(cli: Cli, folder: Path, field: str) -> None:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":{%s}}}' % field.encode()
    Path("m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(Exception, match="header"):
        load_file("m.safetensors")
    cli("params", "m.safetensors", code=4)


@pytest.mark.filterwarnings("ignore")
def test_finite_fails_on_tensors_outside_the_guessed_state_dict_of_a_folder(cli: Cli, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"w": FINE, "x": {"a": {WRONG}}}, checkpoint_id="one")
    save({"w": FINE, "optimizer": {"state": {"w": {"m": WRONG}}}, "step": 1}, checkpoint_id="trained")
    cli("check", "one/", "--finite", code=1)
    cli("check", "trained/", "--finite")
