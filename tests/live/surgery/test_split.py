"""split: compared with torch.split, in all formats and dtypes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import modelcli
from modelcli.errors import RequestError
from tests.conftest import Cli
from tests.live.surgery.state_files import FILES, assert_same, bits, other, parts_of, read, values, write

QKV = ("split", "**.qkv.*", "**.q.*", "**.k.*", "**.v.*")
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.complex64)
IN_A_FOLDER = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def attention(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    found = {"first": values((5,), torch.float32, 9)}
    for layer in range(2):
        found[f"h.{layer}.qkv.weight"] = values((6, 4), dtype, layer)
        found[f"h.{layer}.qkv.bias"] = values((6,), dtype, 7 + layer)
        found[f"h.{layer}.out.weight"] = values((4, 4), dtype, 5 + layer)
    return found


def split(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in state.items():
        if ".qkv." not in name:
            found[name] = value
            continue
        for new, part in zip("qkv", torch.split(value, value.shape[0] // 3), strict=True):
            found[name.replace("qkv", new)] = part
    return found


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_torch_makes(cli: Cli, file: str, dtype: torch.dtype) -> None:
    state = attention(dtype)
    write(state, file)
    cli(*QKV, "-m", file, "-o", other(file))
    found = read(other(file))
    assert_same(found, split(state))
    if file.endswith(".pth"):
        assert list(found) == list(split(state))
        for value in found.values():  # each holds its bytes alone
            assert value.untyped_storage().nbytes() == value.nbytes
        mapped = torch.load(other(file), weights_only=True, mmap=True)
        assert len({value.untyped_storage().data_ptr() for value in mapped.values()}) == len(mapped)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("dim", "sizes"), [(1, (2, 1)), (-1, (2, 3)), (0, (0, 4)), (-3, (1, 3)), (2, (5, 0))])
def test_sizes_along_an_axis(cli: Cli, file: str, dim: int, sizes: tuple[int, ...]) -> None:
    value = values((4, 3, 5), torch.float16)
    if dim == 1:
        value = values((3, 4, 5), torch.float16).transpose(0, 1)  # no row-major view
    if not file.endswith(".pth"):
        value = value.contiguous()
    write({"x.w": value, "y": torch.ones(1)}, file)
    cli("split", "*.w", "*.a", "*.b", "--dim", str(dim), "--sizes", ",".join(map(str, sizes)), "-m", file, "-o",
        other(file))  # fmt: skip
    a, b = torch.split(value, sizes, dim)
    assert_same(read(other(file)), {"x.a": a, "x.b": b, "y": torch.ones(1)})


def test_other_views_of_the_same_bytes_stay(cli: Cli) -> None:
    whole = torch.arange(12.0).reshape(6, 2)
    torch.save({"qkv": whole, "rows": whole[2:4]}, "a.pth")
    cli("split", "qkv", "q", "k", "v", "-m", "a.pth", "-o", "b.pth")
    found = torch.load("b.pth", weights_only=True)
    assert_same(found, {**dict(zip("qkv", whole.split(2), strict=True)), "rows": whole[2:4]})
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) == 4


def test_tied_tensors_have_tied_parts_and_a_name_that_is_left_is_told(cli: Cli) -> None:
    whole = torch.randn(4, 2)
    torch.save({"a.w": whole, "b.w": whole, "c": whole}, "a.pth")
    told = cli("split", "{a,b}.w", "{a,b}.x", "{a,b}.y", "-m", "a.pth", "-o", "b.pth").err
    assert "a.w was tied to c, which stays as it was" in told
    found = torch.load("b.pth", weights_only=True)
    assert list(found) == ["a.x", "a.y", "b.x", "b.y", "c"]
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) == 3
    assert found["a.x"].data_ptr() == found["b.x"].data_ptr()


def test_what_is_shown_of_few_and_of_many(cli: Cli) -> None:
    torch.save({f"h.{layer}.w": torch.ones(2, 3) for layer in range(25)}, "a.pth")
    assert (
        "h.3.w  [2, 3]  ->  h.3.a, h.3.b [1, 3]  same size"
        in cli("split", "h.3.w", "h.3.a", "h.3.b", "-m", "a.pth").out
    )
    shown = cli("split", "h.*.w", "h.*.a", "h.*.b", "-m", "a.pth").out
    assert ".  25 keys  ->  50 keys  same size" in shown
    assert "params:      150" in shown


def test_flags_and_kinds_stay(cli: Cli) -> None:
    torch.save(attention(), "a.pth")
    cli("apply", "-m", "a.pth", "-e", "freeze h.0", "-e", " ".join(f"'{word}'" for word in QKV), "-o", "b.pth")
    rows = {row["name"]: row for row in cli("params", "b.pth", "--json").json["tensors"]}
    assert all((row["trainable"] is False) == name.startswith("h.0.") for name, row in rows.items())
    assert {row["kind"] for row in rows.values()} == {"parameter"}


def test_a_cast_before_it_is_counted_and_one_after_it_works(cli: Cli) -> None:
    torch.save({"w": torch.tensor([1.0, 1e30, 2.0, 3.0])}, "a.pth")
    for lines in (("cast . float16", "split w a b"), ("split w a b", "cast . float16")):
        told = cli("apply", "-m", "a.pth", *(word for line in lines for word in ("-e", line)), "-o", "b.pth", "--force")
        assert "1 value became Inf in a" in told.err
        found = torch.load("b.pth", weights_only=True)
        assert_same(found, {"a": torch.tensor([1.0, torch.inf]).half(), "b": torch.tensor([2.0, 3.0]).half()})


def test_it_needs_no_torch(folder: Path) -> None:
    torch.save(attention(), "a.pth")
    code = (
        "import sys; from modelcli.cli import main; "
        "assert main(['split', '**.qkv.*', '**.q.*', '**.k.*', '**.v.*', '-m', 'a.pth', '-o', 'b.pth']) == 0; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=folder, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("**.w", "**.a", "**.b"), "x.w has the shape [5, 4], and 5 cannot be divided into 2 equal parts"),
        (("**.w", "**.a", "**.b", "--sizes", "2,2"), "and x.w with the shape [5, 4] has 5 along axis 0"),
        (("**.w", "**.a", "**.b", "--sizes", "2,2,1"), "has 3 numbers with the sum 5"),
        (("**.w", "**.a", "**.b", "--sizes", "6,-1"), "is no list of sizes"),
        (("**.w", "**.a", "**.b", "--dim", "2"), "x.w has the shape [5, 4], and so no axis 2"),
        (("**.w", "**.a", "**.b", "--dim", "x"), "takes the number of an axis, not 'x'"),
        (("n", "a", "b"), "hint: reshape n 1 gives it an axis"),
        (("x.w", "x.a"), "split takes an old name and at least two new ones"),
        (("x.w", "x.a", "x.a"), "two parts would both be called x.a"),
        (("x.w", "x.a", "n", "--dim", "1"), "would both be called n"),
        (("x.w", "x.w", "x.w.b", "--dim", "1"), "x.w cannot be a tensor and a module at once"),
        (("*.w", "a", "b"), "'*.w' has the wildcard *, and 'a' has no wildcard"),
        (("x", "a", "b"), "'x' is a module, not a key"),
        (("z.*", "z.*.a", "z.*.b"), "no tensor matches 'z.*'"),
        (("s", "a", "b"), "s is no dense tensor: its layout is sparse_coo, its shape [4]"),
        (("fp8.weight", "a", "b"), "its elements times fp8.weight_scale_inv"),
    ],
)
def test_what_is_refused(cli: Cli, words: tuple[str, ...], message: str) -> None:
    state: dict[str, Any] = {
        "x.w": torch.ones(5, 4),
        "n": torch.ones(()),
        "s": torch.ones(4).to_sparse(),
        "fp8.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "fp8.weight_scale_inv": torch.ones(1, 1),
    }
    torch.save(state, "a.pth")
    told = " ".join(cli("split", *words, "-m", "a.pth", "-o", "b.pth", code=2).err.split())
    assert message in told
    assert not Path("b.pth").exists()


def test_a_model_is_refused_and_the_hint_works(cli: Cli) -> None:
    with pytest.raises(RequestError) as caught:
        modelcli.apply(nn.Linear(2, 2), "split weight a b")
    assert "--bare-keys" in (caught.value.hint or "")
    cli("save", "a.pth", "-m", "Linear(2,2)")
    told = cli("split", "weight", "a", "b", "-m", "a.pth", "-o", "b.pth", code=2).err
    assert "Linear takes its tensors as they are" in told
    cli("split", "weight", "a", "b", "-m", "a.pth", "-o", "b.pth", "--bare-keys")
    assert list(torch.load("b.pth", weights_only=True)) == ["a", "b", "bias"]


@pytest.mark.parametrize("file", ["a.pth", "a.safetensors"])
def test_the_script_writes_the_same(cli: Cli, folder: Path, file: str) -> None:
    write(attention(torch.bfloat16), file)
    lines = ["split '**.qkv.*' '**.q.*' '**.k.*' '**.v.*'", "split h.1.q.weight a b --dim 1 --sizes 1,3", "cast . half"]
    edits = [word for line in lines for word in ("-e", line)]
    cli("apply", "-m", file, *edits, "-o", f"by-edit.{file[2:]}")
    (folder / "made.py").write_text(cli("script", "-m", file, *edits, "-o", f"by-script.{file[2:]}").out)
    subprocess.run([sys.executable, "made.py"], check=True, cwd=folder, capture_output=True)
    one, two = read(f"by-edit.{file[2:]}"), read(f"by-script.{file[2:]}")
    assert_same(one, two)
    if file == "a.pth":
        assert list(one) == list(two)


# --- there and back ------------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@IN_A_FOLDER
def test_split_and_concat_give_the_first_file_back(
    cli: Cli, folder: Path, shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    cut = data.draw(st.integers(0, shape[dim]))
    state = {name: values(shape, dtype, seed) for seed, name in enumerate(("l.0.w", "l.0.x", "l.1.w", "z"))}
    state["l.1.b"] = values((3,), torch.float32)
    write(state, str(folder / "plain.safetensors"))
    for suffix in ("safetensors", "pth"):
        cli("save", f"a.{suffix}", "-m", "plain.safetensors", "--force")
        sizes = f"{cut},{shape[dim] - cut}"
        cli("split", "l.*.w", "l.*.a", "l.*.b2", "--dim", str(dim), "--sizes", sizes, "-m", f"a.{suffix}", "-o",
            f"b.{suffix}", "--force")  # fmt: skip
        cli(
            "concat", "l.*.a", "l.*.b2", "l.*.w", "--dim", str(dim), "-m", f"b.{suffix}", "-o", f"c.{suffix}", "--force"
        )
    assert parts_of("c.safetensors") == parts_of("a.safetensors")
    before, after = read("a.pth"), read("c.pth")
    assert list(after) == list(before)
    assert [bits(value) for value in after.values()] == [bits(value) for value in before.values()]
