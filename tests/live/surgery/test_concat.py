"""concat: compared with torch.cat, in all formats and dtypes."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import modelcli
from modelcli.checkpoints.storage import Span, identity_of
from modelcli.errors import RequestError
from modelcli.values import interleaved
from modelcli.values.interleaved import Interleaved
from tests.conftest import Cli
from tests.live.surgery.state_files import FILES, assert_same, other, read, values, write

DTYPES = (torch.float64, torch.bfloat16, torch.float8_e5m2, torch.bool, torch.complex64)
IN_A_FOLDER = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def experts(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    found = {}
    for layer in range(2):
        for seed, name in enumerate(("v", "gate", "up")):
            shape = (3, 2, 4) if name == "gate" else (3, 2 * (1 + seed), 4)
            value = values(shape, torch.uint8 if dtype == torch.bool else dtype, 3 * layer + seed)
            found[f"h.{layer}.{name}.weight"] = value > 99 if dtype == torch.bool else value
    return found


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, -2])
def test_what_torch_makes(cli: Cli, file: str, dtype: torch.dtype, dim: int) -> None:
    state = experts(dtype)
    write(state, file)
    cli("concat", "h.*.gate.*", "h.*.up.*", "h.*.both.*", "--dim", str(dim), "-m", file, "-o", other(file))
    expected = {}
    for layer in range(2):
        expected[f"h.{layer}.v.weight"] = state[f"h.{layer}.v.weight"]
        parts = [state[f"h.{layer}.gate.weight"], state[f"h.{layer}.up.weight"]]
        expected[f"h.{layer}.both.weight"] = torch.cat(parts, 1)
    found = read(other(file))
    assert_same(found, expected)
    if file.endswith(".pth"):
        assert list(found) == list(expected)


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    sizes=st.lists(st.integers(0, 3), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
    data=st.data(),
)
@IN_A_FOLDER
def test_views_of_any_shape(
    cli: Cli, folder: Path, shape: list[int], sizes: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    """Each part is a transposed or a shortened view of a larger tensor."""
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    state = {}
    for number, size in enumerate(sizes):
        own = list(shape)
        own[dim] = size
        axes = data.draw(st.permutations(range(len(own))))
        whole = values(tuple(own[axis] + 1 for axis in axes), dtype, number)
        state[f"p{number}"] = whole.permute([axes.index(axis) for axis in range(len(own))])[tuple(map(slice, own))]
    torch.save(state, "a.pth")
    cli("concat", *state, "whole", "--dim", str(dim), "-m", "a.pth", "-o", "b.pth", "--force")
    assert_same(read("b.pth"), {"whole": torch.cat(list(state.values()), dim)})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a.w", "b.w", "c"), "a.w is float32 and b.w is float16, and one tensor has one dtype"),
        (("a.w", "a.x", "c"), "a.w has the shape [4, 2] and a.x [4, 3]"),
        (("a.w", "a.b", "c"), "a.w has the shape [4, 2] and a.b [4]"),
        (("*.w", "*.x", "*.c"), "b.w is there, but b.x is not, so they cannot be joined to b.c"),
        (("*.x", "*.w", "*.c", "--dim", "1"), "b.w is there, but b.x is not"),
        (("a.w", "a.w", "c"), "a.w would be used twice"),
        (("a.w", "a.x", "a", "--dim", "1"), "a cannot be a tensor and a module at once"),
        (("a.w", "c"), "concat takes at least two old names and a new one"),
        (("a.w", "*.x", "c"), "'a.w' has no wildcard, and '*.x' has the wildcard *"),
        (("a.w", "a.x", "c", "--dim", "7"), "a.w has the shape [4, 2], and so no axis 7"),
        (("s", "a.b", "c"), "s is no dense tensor"),
        (("fp8.weight", "fp8b.weight", "c"), "its elements times fp8.weight_scale_inv"),
    ],
)
def test_what_is_refused(cli: Cli, words: tuple[str, ...], message: str) -> None:
    state: dict[str, Any] = {
        "a.w": torch.ones(4, 2),
        "a.x": torch.ones(4, 3),
        "a.b": torch.ones(4),
        "b.w": torch.ones(4, 2).half(),
        "s": torch.ones(4).to_sparse(),
        "fp8.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "fp8.weight_scale_inv": torch.ones(1, 1),
        "fp8b.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
    }
    torch.save(state, "a.pth")
    assert message in " ".join(cli("concat", *words, "-m", "a.pth", "-o", "b.pth", code=2).err.split())
    assert not Path("b.pth").exists()


def test_a_frozen_and_a_trained_tensor_are_refused_until_they_agree(cli: Cli) -> None:
    torch.save({"a": torch.ones(2), "b": torch.zeros(2)}, "a.pth")
    words = ("-e", "freeze a", "-e", "unfreeze b", "-e", "concat a b c")
    assert "a is frozen and b is trained" in cli("apply", "-m", "a.pth", *words, code=2).err
    cli("apply", "-m", "a.pth", "-e", "freeze a", "-e", "freeze b", "-e", "concat a b c", "-o", "b.pth")
    assert [row["trainable"] for row in cli("params", "b.pth", "--json").json["tensors"]] == [False]


def test_a_cast_of_one_part_is_counted(cli: Cli) -> None:
    torch.save({"a": torch.tensor([1.0, 1e30]), "b": torch.tensor([2.0]).half()}, "a.pth")
    told = cli("apply", "-m", "a.pth", "-e", "cast a half", "-e", "concat a b c", "-o", "b.pth").err
    assert "1 value became Inf in c" in told
    assert_same(read("b.pth"), {"c": torch.tensor([1.0, torch.inf, 2.0]).half()})


def test_a_model_is_refused() -> None:
    with pytest.raises(RequestError, match="concat changes the keys of a state dict, and Linear takes its tensors"):
        modelcli.apply(nn.Linear(2, 2), "concat weight bias both")


def test_the_script_writes_the_same(cli: Cli, folder: Path) -> None:
    write(experts(torch.bfloat16), "a.pth")
    lines = ["concat h.*.up.* h.*.gate.* h.*.both.* --dim 1", "concat h.1.both.weight h.1.v.weight all --dim -2"]
    edits = [word for line in lines for word in ("-e", line)]
    cli("apply", "-m", "a.pth", *edits, "-o", "by-edit.pth")
    (folder / "made.py").write_text(cli("script", "-m", "a.pth", *edits, "-o", "by-script.pth").out)
    subprocess.run([sys.executable, "made.py"], check=True, cwd=folder, capture_output=True)
    one, two = read("by-edit.pth"), read("by-script.pth")
    assert list(one) == list(two)
    assert_same(one, two)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 7, 30, 1 << 20])
@given(data=st.data())
@IN_A_FOLDER
def test_any_piece_of_joined_rows(folder: Path, window: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 5))
    widths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    blocks = [values((rows, width), torch.uint8, number) for number, width in enumerate(widths)]
    expected = torch.cat(blocks, 1).numpy().tobytes()
    file = folder / "rows"
    file.write_bytes(b"".join(block.numpy().tobytes() for block in blocks))
    starts = [rows * sum(widths[:number]) for number in range(len(widths))]
    spans = tuple(
        Span(file, start, rows * width, identity_of(file)) for start, width in zip(starts, widths, strict=True)
    )
    start = data.draw(st.integers(0, len(expected)))
    nbytes = data.draw(st.integers(0, len(expected) - start))
    before = interleaved.WINDOW
    interleaved.WINDOW = window
    try:
        made = Interleaved(spans, tuple(widths), rows)
        assert made.bytes() == expected
        assert made.part(start, nbytes).bytes() == expected[start : start + nbytes]
    finally:
        interleaved.WINDOW = before


@pytest.mark.parametrize("dim", ["0", "1"])
def test_large_tensors_are_joined_in_little_memory(cli: Cli, dim: str) -> None:
    state = {name: torch.full((4096, 4096), number, dtype=torch.float32) for number, name in enumerate("ab")}
    torch.save(state, "a.pth")  # 128 MiB
    tracemalloc.start()
    cli("concat", "a", "b", "c", "--dim", dim, "-m", "a.pth", "-o", "b.pth")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 72e6
    assert torch.equal(read("b.pth")["c"], torch.cat([state["a"], state["b"]], int(dim)))
