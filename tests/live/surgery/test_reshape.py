"""reshape: compared with torch.reshape, in all formats and dtypes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import modelcli
from modelcli.errors import RequestError
from tests.conftest import Cli
from tests.live.surgery.state_files import FILES, assert_same, bits, other, parts_of, read, values, write

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int16, torch.complex64)
IN_A_FOLDER = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, -1, 2), (24,), (-1, 3, 4, 1), (24, 1)])
def test_what_torch_makes(cli: Cli, file: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = {name: values((4, 6), dtype, seed) for seed, name in enumerate(("h.0.w", "h.1.w", "rest"))}
    write(state, file)
    cli("reshape", "h.*.w", ",".join(map(str, shape)), "-m", file, "-o", other(file))
    expected = {name: value.reshape(shape) if name != "rest" else value for name, value in state.items()}
    assert_same(read(other(file)), expected)


def test_views_that_are_not_row_major(cli: Cli) -> None:
    value = torch.randn(5, 6, 4).half().transpose(0, 2)[1:4, ::2]
    torch.save({"w": value, "x": value[0]}, "a.pth")
    lines = ("reshape w 5,9", "permute w 1,0", "split w a b --sizes 2,7", "reshape {a,b} -- -1")
    cli("apply", "-m", "a.pth", *(word for line in lines for word in ("-e", line)), "-o", "b.pth")
    a, b = value.reshape(5, 9).t().split((2, 7))
    found = read("b.pth")
    assert torch.equal(found.pop("x"), value[0])  # a view of the old bytes, as before
    assert_same(found, {"a": a.reshape(-1), "b": b.reshape(-1)})


def test_a_shape_without_axes_and_one_of_no_elements(cli: Cli) -> None:
    torch.save({"one": torch.ones(1, 1), "none": torch.ones(0, 3)}, "a.pth")
    cli("apply", "-m", "a.pth", "-e", "reshape one 1,1,1", "-e", "reshape none 2,-1", "-o", "b.pth")
    assert_same(read("b.pth"), {"one": torch.ones(1, 1, 1), "none": torch.ones(2, 0)})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("w", "4"), "w has the shape [2, 3], which are 6 elements, and 4 has 4"),
        (("w", "4,-1"), "w has the shape [2, 3], and its 6 elements do not fit into 4,-1: they are no multiple of 4"),
        (("w", "0,-1"), "they are no multiple of 0"),
        (("w", "2,-1,-1"), "2,-1,-1 leaves more than one size open"),
        (("w", "2,-3"), "'2,-3' is no list of sizes"),
        (("w", ",".join(["1"] * 70)), "70 axes"),
        (("w",), "reshape takes at least one target and a shape"),
        (("s", "4"), "s is no dense tensor"),
    ],
)
def test_what_is_refused(cli: Cli, words: tuple[str, ...], message: str) -> None:
    torch.save({"w": torch.ones(2, 3), "s": torch.ones(2, 2).to_sparse()}, "a.pth")
    assert message in " ".join(cli("reshape", *words, "-m", "a.pth", "-o", "b.pth", code=2).err.split())
    assert not Path("b.pth").exists()


def test_a_model_is_refused() -> None:
    with pytest.raises(RequestError, match="reshape changes the keys of a state dict, and Linear takes its tensors"):
        modelcli.apply(nn.Linear(2, 2), "reshape weight 4")


def test_the_script_writes_the_same(cli: Cli, folder: Path) -> None:
    state = {f"h.{number}.w": values((3, 2), torch.bfloat16, number).t() for number in range(6)}
    torch.save(state, "a.pth")
    edits = ("-e", "reshape h.*.w 3,1,-1", "-e", "reshape h.1.w 6")
    cli("apply", "-m", "a.pth", *edits, "-o", "by-edit.pth")
    (folder / "made.py").write_text(cli("script", "-m", "a.pth", *edits, "-o", "by-script.pth").out)
    subprocess.run([sys.executable, "made.py"], check=True, cwd=folder, capture_output=True)
    one, two = read("by-edit.pth"), read("by-script.pth")
    assert list(one) == list(two)
    assert_same(one, two)


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), dtype=st.sampled_from(DTYPES))
@IN_A_FOLDER
def test_a_shape_and_the_old_one_give_the_first_file_back(
    cli: Cli, folder: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    state = {name: values(shape, dtype, seed) for seed, name in enumerate(("l.0.w", "l.1.w"))}
    state["l.0.b"] = values((3,), torch.float32)
    write(state, str(folder / "plain.safetensors"))
    for suffix in ("safetensors", "pth"):
        cli("save", f"a.{suffix}", "-m", "plain.safetensors", "--force")
        cli("reshape", "l.*.w", "1,-1", "-m", f"a.{suffix}", "-o", f"b.{suffix}", "--force")
        cli("reshape", "l.*.w", ",".join(map(str, shape)), "-m", f"b.{suffix}", "-o", f"c.{suffix}", "--force")
    assert parts_of("c.safetensors") == parts_of("a.safetensors")
    before, after = read("a.pth"), read("c.pth")
    assert list(after) == list(before)
    assert [bits(value) for value in after.values()] == [bits(value) for value in before.values()]
