"""permute: compared with torch.permute, in all formats and dtypes."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations
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

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.complex64)
IN_A_FOLDER = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_torch_makes(cli: Cli, file: str, dtype: torch.dtype) -> None:
    state = {name: values((3, 5), dtype, seed) for seed, name in enumerate(("h.0.w", "h.1.w", "rest"))}
    write(state, file)
    cli("permute", "h.*.w", "1,0", "-m", file, "-o", other(file))
    expected = {name: value.t() if name != "rest" else value for name, value in state.items()}
    assert_same(read(other(file)), expected)
    if file.endswith(".pth"):
        assert list(read(other(file))) == list(state)


def test_it_keeps_its_place_after_others_were_removed(cli: Cli) -> None:
    """A new tensor has no number that a removed one had, and so does not stand in its place."""
    torch.save({"a": torch.ones(2, 3), "b": torch.zeros(1), "c.w": torch.ones(2), "c.x": torch.ones(3, 2)}, "a.pth")
    cli("apply", "-m", "a.pth", "-e", "remove c", "-e", "permute a 1,0", "-o", "b.pth")
    assert_same(read("b.pth"), {"a": torch.ones(3, 2), "b": torch.zeros(1)})
    assert list(read("b.pth")) == ["a", "b"]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_every_order_of_a_view(cli: Cli, order: tuple[int, ...]) -> None:
    value = values((4, 6, 5), torch.float16).transpose(0, 2)[1:4, ::2]
    torch.save({"w": value}, "a.pth")
    cli("permute", "w", ",".join(map(str, order)), "-m", "a.pth", "-o", "b.pth")
    assert_same(read("b.pth"), {"w": value.permute(order)})


def test_a_tied_tensor_changes_under_all_of_its_names(cli: Cli) -> None:
    value = torch.randn(2, 3)
    torch.save({"a": value, "b": value, "c": torch.ones(1)}, "a.pth")
    told = cli("permute", "a", "1,0", "-m", "a.pth", "-o", "b.pth").err
    assert "a is tied to b, so that is changed too" in told
    found = read("b.pth")
    assert_same(found, {"a": value.t(), "b": value.t(), "c": torch.ones(1)})
    assert found["a"].data_ptr() == found["b"].data_ptr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("w", "0,1,2"), "w has the shape [2, 3], which is 2 axes, not 3"),
        (("n", "1,0"), "n has the shape [], which is 0 axes, not 2"),
        (("w", "0,0"), "0,0 is no order of axes: 2 axes are 0 to 1, each named once"),
        (("w", "1,2"), "1,2 is no order of axes"),
        (("w", "a,b"), "'a,b' is no list of axes"),
        (("w",), "permute takes at least one target"),
        (("x", "1,0"), "no tensor matches 'x'"),
        (("w", "1,0", "--expect", "2"), "1 tensor matches, not the 2 expected"),
        (("s", "1,0"), "s is no dense tensor"),
    ],
)
def test_what_is_refused(cli: Cli, words: tuple[str, ...], message: str) -> None:
    torch.save({"n": torch.ones(()), "w": torch.ones(2, 3), "s": torch.ones(2, 2).to_sparse()}, "a.pth")
    assert message in " ".join(cli("permute", *words, "-m", "a.pth", "-o", "b.pth", code=2).err.split())
    assert not Path("b.pth").exists()


def test_a_model_is_refused() -> None:
    with pytest.raises(RequestError, match="permute changes the keys of a state dict, and Linear takes its tensors"):
        modelcli.apply(nn.Linear(2, 2), "permute weight 1,0")


def test_the_script_writes_the_same(cli: Cli, folder: Path) -> None:
    state = {f"h.{number}.w": values((3, 2), torch.bfloat16, number) for number in range(6)}
    state["tied"] = state["h.0.w"]
    torch.save(state, "a.pth")
    edits = ("-e", "permute h.*.w 1,0", "-e", "permute h.1.w 0,1")
    cli("apply", "-m", "a.pth", *edits, "-o", "by-edit.pth")
    (folder / "made.py").write_text(cli("script", "-m", "a.pth", *edits, "-o", "by-script.pth").out)
    subprocess.run([sys.executable, "made.py"], check=True, cwd=folder, capture_output=True)
    one, two = read("by-edit.pth"), read("by-script.pth")
    assert list(one) == list(two)
    assert_same(one, two)
    assert one["tied"].data_ptr() == one["h.0.w"].data_ptr()
    assert two["tied"].data_ptr() == two["h.0.w"].data_ptr()


@given(order=st.integers(1, 4).flatmap(lambda count: st.permutations(range(count))), dtype=st.sampled_from(DTYPES))
@IN_A_FOLDER
def test_an_order_and_its_inverse_give_the_first_file_back(
    cli: Cli, folder: Path, order: list[int], dtype: torch.dtype
) -> None:
    state = {name: values((2, 3, 1, 4)[: len(order)], dtype, seed) for seed, name in enumerate(("l.0.w", "l.1.w"))}
    state["l.0.b"] = values((3,), torch.float32)
    write(state, str(folder / "plain.safetensors"))
    inverse = [order.index(axis) for axis in range(len(order))]
    for suffix in ("safetensors", "pth"):
        cli("save", f"a.{suffix}", "-m", "plain.safetensors", "--force")
        for one, two, axes in (("a", "b", order), ("b", "c", inverse)):
            words = ("-m", f"{one}.{suffix}", "-o", f"{two}.{suffix}", "--force")
            cli("permute", "l.*.w", ",".join(map(str, axes)), *words)
    assert parts_of("c.safetensors") == parts_of("a.safetensors")
    before, after = read("a.pth"), read("c.pth")
    assert list(after) == list(before)
    assert [bits(value) for value in after.values()] == [bits(value) for value in before.values()]
