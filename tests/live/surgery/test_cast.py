"""`cast` equals `.to(dtype)`, reads files in pieces, keeps ties and views, and refuses what cannot be converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
def test_cast_equals_to(cli: Cli, dtype: str) -> None:
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
def test_short_names_of_dtypes(cli: Cli, nickname: str, dtype: str) -> None:
    change = cli("cast", ".", nickname, "-m", "alexnet", "--json").json
    assert change["changes"][:1] == [
        {"path": ".", "action": "cast", "before": "float32", "after": dtype,
         "params_before": 61_100_840, "params_after": 61_100_840,
         "bytes_before": 244_403_360, "bytes_after": change["totals_after"]["param_bytes"]}
    ] if dtype != "float32" else change["changes"] == []  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("cast . int8", "'int8' is not a floating-point dtype", "float"),
        ("cast . bflot16", "'bflot16' is not a floating-point dtype", "did you mean bfloat16"),
        ("cast . float4_e2m1fn_x2", "is not a floating-point dtype", ""),
        ("cast bfloat16", "cast takes at least one target and a dtype", "cast . bfloat16"),
        ("cast 1 half", "'1' has no tensors", "modelcli params lists the parameters"),
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


def test_integer_and_complex_tensors_are_not_cast(cli: Cli) -> None:
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


def test_a_cast_keeps_ties_and_views(cli: Cli) -> None:
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


def test_casting_only_some_tensors_of_a_storage_is_refused(cli: Cli) -> None:
    base = torch.arange(12.0)
    torch.save({"whole": base, "part": base[:4], "other": torch.ones(2)}, "in.pth")
    error = cli("cast", "part", "half", "-m", "in.pth", "-o", "out.pth", code=2).err
    assert "part and whole share memory, and casting part alone would separate them" in error
    assert "name both: part whole" in error
    cli("cast", "part", "whole", "half", "-m", "in.pth", "-o", "out.pth")


def test_large_tensors_are_converted_in_pieces(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of 40 MB goes through memory in pieces of at most 8 MiB of result."""
    from modelcli.values import casting, conversion

    torch.save({"w": torch.randn(10_000_000)}, "in.pth")
    largest = []
    original = casting.cast

    def counted(elements: Any, before: str, after: str) -> Any:
        largest.append(len(elements))
        return original(elements, before, after)

    monkeypatch.setattr(casting, "cast", counted)
    cli("cast", ".", "half", "-m", "in.pth", "-o", "out.pth")
    assert sum(largest) == 10_000_000
    assert max(largest) <= conversion.PIECE
    assert torch.equal(state_of("out.pth")["w"], torch.load("in.pth")["w"].half())


def test_gradients_follow() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    modelcli.apply(model, "cast . float64")
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float64


def test_the_check_runs_in_the_new_dtype(cli: Cli) -> None:
    """A whole model in half precision runs on half precision. A single cast layer does not fit its neighbours."""
    assert "runs: [1,3,224,224] -> [1,1000]" in cli("cast", ".", "bf16", "-m", "alexnet").out
    error = cli("cast", "classifier.4", "bf16", "-m", "alexnet", "-o", "out.pth", code=2).err
    assert "classifier.4 Linear(4096, 4096) does not fit: [1,4096] float32 flows in" in error
    assert "hint: cast . bfloat16 casts the whole model; --check none writes the model anyway" in error
    words = ("-e", "replace 1 Linear(4,4,dtype=torch.bfloat16)", "-m", "Sequential(Linear(3,4),ReLU(),Linear(4,2))")
    error = cli("apply", *words, "--input-size", "1,3", code=2).err
    assert "hint: cast . bfloat16 casts the whole model" in error
    told = cli("cast", ".", "float8_e4m3fn", "-m", "alexnet", "-o", "out.pth").out
    assert "not made: float8_e4m3fn is only for storage" in told


def test_a_note_says_that_a_cast_changes_nothing(cli: Cli) -> None:
    assert "note: . is float32 already" in cli("cast", ".", "float32", "-m", "alexnet").err


# --- weights with scales beside them -------------------------------------------------------------------------------


def fp8(*shape: int) -> torch.Tensor:
    return torch.ones(*shape).to(torch.float8_e4m3fn)


def bytes_(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.weight": fp8(4, 4), "a.weight_scale_inv": torch.ones(1, 1)}, "a.weight is a scaled float8_e4m3fn weight"),
        ({"a.weight": fp8(4, 4), "a.weight_scale": torch.ones(1)}, "times a.weight_scale:"),
        ({"a.weight": fp8(4, 4), "a.scale_weight": torch.ones(1)}, "times a.scale_weight:"),
        (
            {
                "a.qweight": torch.ones(2, 4, dtype=torch.int32),
                "a.qzeros": torch.ones(1, 1, dtype=torch.int32),
                "a.scales": torch.ones(1, 4).half(),
            },
            "a.qweight is a weight packed by GPTQ or AWQ",
        ),
        (
            {"a.weight_packed": torch.ones(2, 4, dtype=torch.int32), "a.weight_scale": torch.ones(4)},
            "compressed-tensors",
        ),
        ({"a.weight": bytes_(8, 1), "a.weight.absmax": torch.ones(1)}, "a packed uint8 weight"),
        ({"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.SCB": torch.ones(4)}, "times a.SCB"),
    ],
)
def test_scaled_weights_are_not_cast(cli: Cli, state: dict[str, torch.Tensor], message: str) -> None:
    torch.save({**state, "norm.weight": torch.ones(4)}, "in.pth")
    error = cli("cast", ".", "bfloat16", "-m", "in.pth", "-o", "out.pth", code=2).err
    assert message in error
    cli("cast", "norm", "bfloat16", "-m", "in.pth", "-o", "out.pth")
    found = state_of("out.pth")
    assert found["norm.weight"].dtype == torch.bfloat16
    assert all(found[name].dtype == tensor.dtype for name, tensor in state.items())


def test_fp8_without_a_scale_is_cast(cli: Cli) -> None:
    torch.save({"a.weight": fp8(4, 4), "a.bias": torch.ones(4)}, "in.pth")
    cli("cast", ".", "bfloat16", "-m", "in.pth", "-o", "out.pth")
    assert state_of("out.pth")["a.weight"].equal(torch.ones(4, 4).bfloat16())


# --- values that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors"])
@pytest.mark.parametrize(
    ("dtype", "after"),
    [("float32", "float16"), ("float64", "float32"), ("float32", "bfloat16"), ("float64", "float16")],
)
def test_values_beyond_the_range_are_counted(cli: Cli, out: str, dtype: str, after: str) -> None:
    torch.manual_seed(0)
    before, target = getattr(torch, dtype), getattr(torch, after)
    spread = torch.finfo(target).max * 1.5 * (2 * torch.rand(3_000_000, dtype=torch.float64) - 1)
    values = spread.clamp(torch.finfo(before).min, torch.finfo(before).max).to(before)
    values[:4] = torch.tensor([float("inf"), float("nan"), 0, torch.finfo(target).max])
    state = {"w": values.view(1000, 3000).T, "v": torch.ones(2, dtype=before)}
    torch.save(state, "in.pth")
    wanted = int((state["w"].isfinite() & state["w"].to(target).isinf()).sum())
    assert wanted
    note = f"{wanted:,} values became Inf in w: the largest value of {after} is"
    assert note in cli("cast", ".", after, "-m", "in.pth", "-o", out).err
    assert "became" not in cli("cast", "v", after, "-m", "in.pth", "-o", out, "--force").err


def test_values_that_saturate_are_counted(cli: Cli) -> None:
    values = torch.tensor([1.0, 448.0, 449.0, 1e6, -1e9])
    torch.save({"w": values}, "in.pth")
    err = cli("cast", ".", "float8_e4m3fn", "-m", "in.pth", "-o", "out.pth").err
    found = state_of("out.pth")["w"].float()
    nan, clamped = int(found.isnan().sum()), int(((values.abs() > 448) & found.isfinite()).sum())
    told = "2 values became NaN" if nan else "3 values became 448"  # older torch: 449 is rounded, the others NaN
    assert (nan, clamped) == ((2, 1) if nan else (0, 3))
    assert told in err


def test_overflow_is_reported_after_a_second_cast(cli: Cli) -> None:
    torch.save({"w": torch.tensor([1.0, 1e5])}, "in.pth")
    err = cli("apply", "-e", "cast . half", "-e", "cast . float32", "-m", "in.pth", "-o", "out.pth").err
    assert "1 value became Inf in w: the largest value of float16 is 65,504" in err
    assert state_of("out.pth")["w"].tolist() == [1.0, float("inf")]
