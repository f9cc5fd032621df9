"""cast: what `.to(dtype)` gives, in pieces from a file, with ties, views and what cannot be converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import modelcli
from modelcli.errors import RequestError
from tests import nets
from tests.conftest import Cli

DTYPES = ["bfloat16", "float16", "float64", "float32", "float8_e4m3fn", "float8_e5m2"]


def state_of(path: str) -> dict[str, torch.Tensor]:
    return dict(torch.load(path, weights_only=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_to_gives(cli: Cli, dtype: str) -> None:
    torch.manual_seed(0)
    model = nets.Places()
    torch.save(model.state_dict(), "in.pth")
    wanted = getattr(torch, dtype)
    for target, out in ((".", "all.pth"), ("seq", "part.pth")):
        cli("cast", target, dtype, "-m", "in.pth", "-o", out)
        found = state_of(out)
        for name, tensor in model.state_dict().items():
            converts = tensor.is_floating_point() and (target == "." or name.startswith("seq"))
            expected = tensor.to(wanted) if converts else tensor
            assert found[name].dtype == expected.dtype, name
            assert torch.equal(found[name].view(torch.uint8), expected.view(torch.uint8)) if converts else True
    real = modelcli.apply(model, f"cast . {dtype}")
    assert {t.dtype for t in real.parameters()} == {wanted}


@pytest.mark.parametrize(
    ("nickname", "dtype"),
    [
        ("half", "float16"),
        ("double", "float64"),
        ("bf16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("float", "float32"),
    ],
)
def test_names_that_pytorch_users_say(cli: Cli, nickname: str, dtype: str) -> None:
    change = cli("cast", ".", nickname, "-m", "alexnet", "--json").json
    assert change["changes"][:1] == [
        {"path": ".", "action": "cast", "before": "float32", "after": dtype,
         "params_before": 61_100_840, "params_after": 61_100_840,
         "bytes_before": 244_403_360, "bytes_after": change["totals_after"]["param_bytes"]}
    ] if dtype != "float32" else change["changes"] == []  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("cast . int8", "'int8' is no floating-point dtype", "float"),
        ("cast . bflot16", "'bflot16' is no floating-point dtype", "did you mean bfloat16"),
        ("cast . float4_e2m1fn_x2", "is no floating-point dtype", ""),
        ("cast bfloat16", "cast takes at least one target and a dtype", "cast . bfloat16"),
        ("cast 1 half", "'1' has no tensors", "modelcli params shows where they are"),
        ("cast . half --expect 3", "1 matches, not the 3 expected", ""),
    ],
)
def test_refused(line: str, message: str, hint: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(RequestError) as caught:
        modelcli.apply(model, line)
    assert message in caught.value.message
    assert hint in str(caught.value)
    assert model[0].weight.dtype == torch.float32


def test_whole_numbers_and_complex_ones_stay(cli: Cli) -> None:
    state = {
        "a": torch.ones(2),
        "n": torch.arange(3),
        "c": torch.ones(2, dtype=torch.complex64),
        "b": torch.tensor(True),
    }
    torch.save(state, "in.pth")
    cli("cast", ".", "half", "-m", "in.pth", "-o", "out.pth")
    assert {name: tensor.dtype for name, tensor in state_of("out.pth").items()} == {
        "a": torch.float16, "n": torch.int64, "c": torch.complex64, "b": torch.bool,
    }  # fmt: skip


def test_ties_and_views_hold(cli: Cli) -> None:
    base = torch.arange(12.0)
    state = {
        "whole": base.view(3, 4),
        "row": base.view(3, 4)[1],
        "turned": base.view(3, 4).t(),
        "again": base.view(3, 4),
    }
    torch.save(state, "in.pth")
    cli("cast", ".", "bfloat16", "-m", "in.pth", "-o", "out.pth")
    found = state_of("out.pth")
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor.bfloat16())
        assert found[name].stride() == tensor.stride()
    assert Path("out.pth").stat().st_size < Path("in.pth").stat().st_size + 2_000


def test_a_part_of_what_shares_bytes_is_refused(cli: Cli) -> None:
    base = torch.arange(12.0)
    torch.save({"whole": base, "part": base[:4], "other": torch.ones(2)}, "in.pth")
    error = cli("cast", "part", "half", "-m", "in.pth", "-o", "out.pth", code=2).err
    assert "part and whole show the same bytes, and a cast of part alone would part them" in error
    assert "name both: part whole" in error
    cli("cast", "part", "whole", "half", "-m", "in.pth", "-o", "out.pth")


def test_large_tensors_are_converted_in_pieces(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of 40 MB goes through memory in pieces of at most 8 MiB of result."""
    from modelcli.live import sources

    torch.save({"w": torch.randn(10_000_000)}, "in.pth")
    largest = []
    original = sources.real_tensor

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        largest.append(tensor.numel())
        return original(tensor)

    monkeypatch.setattr(sources, "real_tensor", counted)
    cli("cast", ".", "half", "-m", "in.pth", "-o", "out.pth")
    assert max(largest) <= sources.CHUNK // 2
    assert torch.equal(state_of("out.pth")["w"], torch.load("in.pth")["w"].half())


def test_gradients_follow() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    modelcli.apply(model, "cast . float64")
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float64


def test_the_check_runs_in_the_new_dtype(cli: Cli) -> None:
    """The whole model in half precision takes half precision; a part of it does not fit beside the rest."""
    assert "runs: [1,3,224,224] -> [1,1000]" in cli("cast", ".", "bf16", "-m", "alexnet").out
    error = cli("cast", "classifier.4", "bf16", "-m", "alexnet", "-o", "out.pth", code=2).err
    assert "classifier.4 Linear(4096, 4096) does not fit: [1,4096] float32 flows in" in error
    assert "hint: cast . bfloat16 casts the whole model; --check none writes it all the same" in error
    words = ("-e", "replace 1 Linear(4,4,dtype=torch.bfloat16)", "-m", "Sequential(Linear(3,4),ReLU(),Linear(4,2))")
    error = cli("apply", *words, "--input-size", "1,3", code=2).err
    assert "hint: cast . bfloat16 casts the whole model" in error
    told = cli("cast", ".", "float8_e4m3fn", "-m", "alexnet", "-o", "out.pth").out
    assert "not made: float8_e4m3fn is a dtype to store numbers in" in told


def test_nothing_to_do_is_told(cli: Cli) -> None:
    assert "note: . is float32 already" in cli("cast", ".", "float32", "-m", "alexnet").err
