"""stack: compared with torch.stack, in all formats and dtypes."""

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

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.complex64)
IN_A_FOLDER = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def experts(
    dtype: torch.dtype = torch.float32, count: int = 11, shape: tuple[int, ...] = (2, 3)
) -> dict[str, torch.Tensor]:
    """Experts in two layers. There are more than ten, whose names are not in the order of their numbers."""
    return {
        f"layers.{layer}.experts.{number}.{name}.weight": values(
            shape, dtype, number + 100 * layer + 1000 * (name == "w2")
        )
        for layer in range(2)
        for number in sorted(range(count), key=str)
        for name in ("w1", "w2")
    }


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_what_torch_makes(cli: Cli, file: str, dtype: torch.dtype, dim: int) -> None:
    state = experts(dtype)
    write(state, file)
    words = ("layers.*.experts.*.{w1,w2}.weight", "layers.*.experts.{w1,w2}", "--dim", str(dim))
    cli("stack", *words, "-m", file, "-o", other(file))
    expected = {
        f"layers.{layer}.experts.{name}": torch.stack(
            [state[f"layers.{layer}.experts.{number}.{name}.weight"] for number in range(11)], dim
        )
        for layer in range(2)
        for name in ("w1", "w2")
    }
    assert_same(read(other(file)), expected)


def test_the_wildcard_that_counts(cli: Cli) -> None:
    torch.save(
        {f"{one}.{two}.{name}": torch.tensor([one, two]) for one in (4, 5) for two in (0, 1) for name in "ab"}, "a.pth"
    )
    cli("stack", "*.*.*", "*.*", "-m", "a.pth", "-o", "b.pth", code=2)  # the last * matches a and b
    cli("stack", "*.[0-1].*", "*.*", "-m", "a.pth", "-o", "b.pth")
    rows = {one: torch.tensor([[one, 0], [one, 1]]) for one in (4, 5)}
    assert_same(read("b.pth"), {f"{one}.{name}": rows[one] for one in (4, 5) for name in "ab"})
    cli("stack", "[4-5].*", "*", "-m", "b.pth", "-o", "c.pth")
    assert_same(read("c.pth"), {name: torch.stack(list(rows.values())) for name in "ab"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("e.*.w", "e.w"), "e.0.w and its like have the numbers 0, 2, and * takes all from 0 on"),
        (("e.[0-2].w", "e.w"), "have the numbers 0, 2, and [0-2] takes 3 numbers, all of which have to be there"),
        (("*.0.w", "w"), "* stands for 'e' in e.0.w, which is no number"),
        (("e.*.w", "e.*"), "'e.*.w' needs all wildcards of 'e.*' in the same order, and one more for the number"),
        (("e.{0,2}.w", "e.w"), "and one more for the number: * or [0-7]"),
        (("e.[0,2].{v,w}", "e.{v,w}"), "e.0.v has the shape [2] and e.2.v [3]"),
        (("e.[0,2].w", "e"), "e cannot be a tensor and a module at once"),
        (("e.[0,2].w", "e.w", "--dim", "2"), "so no axis 2"),
        (("none.*", "none"), "no tensor matches 'none.*'"),
        (("e.*.w",), "NEW"),
    ],
)
def test_what_is_refused(cli: Cli, words: tuple[str, ...], message: str) -> None:
    state = {"e.0.w": torch.ones(2), "e.2.w": torch.ones(2), "e.0.v": torch.ones(2), "e.2.v": torch.ones(3)}
    torch.save(state, "a.pth")
    assert message in " ".join(cli("stack", *words, "-m", "a.pth", "-o", "b.pth", code=2).err.split())
    assert not Path("b.pth").exists()


def test_a_model_is_refused() -> None:
    with pytest.raises(RequestError, match="stack changes the keys of a state dict, and Sequential takes its tensors"):
        modelcli.apply(nn.Sequential(nn.Linear(2, 2)), "stack *.weight weight")


def test_the_script_writes_the_same(cli: Cli, folder: Path) -> None:
    torch.save(experts(torch.bfloat16), "a.pth")
    lines = ["stack '**.experts.*.w1.weight' '**.experts.w1' --dim -1", "unstack '**.w1' '**.*.w1.weight' --dim 1"]
    edits = [word for line in lines for word in ("-e", line)]
    cli("apply", "-m", "a.pth", *edits, "-o", "by-edit.pth")
    (folder / "made.py").write_text(cli("script", "-m", "a.pth", *edits, "-o", "by-script.pth").out)
    subprocess.run([sys.executable, "made.py"], check=True, cwd=folder, capture_output=True)
    one, two = read("by-edit.pth"), read("by-script.pth")
    assert list(one) == list(two)
    assert_same(one, two)


@given(
    shape=st.lists(st.integers(1, 3), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 12),
    wildcard=st.booleans(),
    data=st.data(),
)
@IN_A_FOLDER
def test_unstack_and_stack_give_the_first_file_back(
    cli: Cli, folder: Path, shape: tuple[int, ...], dtype: torch.dtype, count: int, wildcard: bool, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(-len(shape) - 1, len(shape)))
    whole = list(shape)
    whole.insert(dim % (len(shape) + 1), count)
    state = {name: values(tuple(whole), dtype, seed) for seed, name in enumerate(("l.0.w", "l.1.w"))}
    state["l.0.b"] = values((3,), torch.float32)
    write(state, str(folder / "plain.safetensors"))
    numbers = f"[7-{6 + count}]" if wildcard else "*"
    for suffix in ("safetensors", "pth"):
        cli("save", f"a.{suffix}", "-m", "plain.safetensors", "--force")
        words = ("--dim", str(dim), "--force")
        cli("unstack", "l.*.w", f"l.*.w.{numbers}.x", "-m", f"a.{suffix}", "-o", f"b.{suffix}", *words)
        first = 7 if wildcard else 0
        for number in range(count):
            expected = state["l.1.w"].select(dim, number)
            assert bits(read(f"b.{suffix}")[f"l.1.w.{first + number}.x"]) == bits(expected)
        cli("stack", f"l.*.w.{numbers}.x", "l.*.w", "-m", f"b.{suffix}", "-o", f"c.{suffix}", *words)
    assert parts_of("c.safetensors") == parts_of("a.safetensors")
    before, after = read("a.pth"), read("c.pth")
    assert list(after) == list(before)
    assert [bits(value) for value in after.values()] == [bits(value) for value in before.values()]
