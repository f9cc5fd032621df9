"""unstack: compared with torch.unbind, in all formats and dtypes. The way back is in test_stack.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import modelcli
from modelcli.errors import RequestError
from tests.conftest import Cli
from tests.live.surgery.state_files import FILES, assert_same, other, read, values, write

DTYPES = (torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int32, torch.complex64)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_what_torch_makes(cli: Cli, file: str, dtype: torch.dtype, dim: int) -> None:
    state = {name: values((3, 2, 4), dtype, seed) for seed, name in enumerate(("h.0.w", "h.1.w"))}
    state["rest"] = torch.ones(1)
    write(state, file)
    cli("unstack", "h.*.w", "h.*.experts.*.w", "--dim", str(dim), "-m", file, "-o", other(file))
    expected = {
        f"h.{layer}.experts.{number}.w": part
        for layer in range(2)
        for number, part in enumerate(torch.unbind(state[f"h.{layer}.w"], dim))
    }
    found = read(other(file))
    assert_same(found, expected | {"rest": state["rest"]})
    if file.endswith(".pth"):
        assert list(found) == [*expected, "rest"]
        assert len({value.untyped_storage().data_ptr() for value in found.values()}) == len(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("w", "w.[0-3]"), "w has the shape [2, 3], which makes 2 tensors, and [0-3] takes 4 numbers"),
        (("w", "x"), "'x' needs all wildcards of 'w' in the same order, and one more for the number"),
        (("*", "*.*", "--dim", "1"), "n has the shape [], and so no axis 1"),
        (("none", "none.*"), "none has the shape [0, 2], so nothing would be left of it"),
        (("many", "many.*"), "unstack would make 100,001 tensors, and the limit is 100,000"),
        (("s", "s.*"), "s is no dense tensor"),
        (("x", "x.*"), "no tensor matches 'x'"),
        (("w", "n.*"), "n cannot be a tensor and a module at once"),
    ],
)
def test_what_is_refused(cli: Cli, words: tuple[str, ...], message: str) -> None:
    state = {"n": torch.ones(()), "w": torch.ones(2, 3), "none": torch.ones(0, 2), "many": torch.ones(100_001)}
    torch.save(state | {"s": torch.ones(4).to_sparse()} if words[0] == "s" else state, "a.pth")
    assert message in " ".join(cli("unstack", *words, "-m", "a.pth", "-o", "b.pth", code=2).err.split())
    assert not Path("b.pth").exists()


def test_a_model_is_refused() -> None:
    with pytest.raises(RequestError, match="unstack changes the keys of a state dict, and Linear takes its tensors"):
        modelcli.apply(nn.Linear(2, 2), "unstack weight rows.*")
