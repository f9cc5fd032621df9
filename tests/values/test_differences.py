"""The largest difference of two tensors equals what torch computes from the whole tensors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelcli.live import value_entries
from modelcli.values import differences, reading
from modelcli.values.differences import Difference
from tests.needs import each
from tests.values.test_statistics import COMPLEX, FLOATS, FLOATS_OF_A_BYTE, INTEGERS, random_tensor

ALL = (*INTEGERS, *FLOATS, *FLOATS_OF_A_BYTE, *COMPLEX)


def largest(one: torch.Tensor, other: torch.Tensor) -> float | None:
    entries = value_entries.plain({"one": one, "other": other})
    return differences.compared({"w": (entries["one"], entries["other"])}, lambda _: None)["w"].largest


def are_close(one: torch.Tensor, other: torch.Tensor, rtol: float, atol: float) -> bool:
    entries = value_entries.plain({"one": one, "other": other})
    found = differences.compared({"w": (entries["one"], entries["other"])}, lambda _: None, rtol)["w"]
    return found.beyond is not None and found.beyond <= atol


def by_torch(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, computed from Python integers, or with float64 and complex128 in torch."""
    if not one.numel():
        return 0
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in (one, other)}
    if kinds <= set(INTEGERS) and ("uint64" not in kinds or len(kinds) == 1):
        pairs = zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)
        return max(abs(int(left) - int(right)) for left, right in pairs)
    is_complex = one.is_complex() or other.is_complex()
    left, right = (tensor.to(torch.complex128 if is_complex else torch.float64) for tensor in (one, other))
    apart = (left - right).abs()
    if is_complex:
        parts = [torch.view_as_real(tensor) for tensor in (left, right)]
        same = torch.isclose(parts[0], parts[1], rtol=0, atol=0, equal_nan=True).all(-1)
    else:
        same = torch.isclose(left, right, rtol=0, atol=0, equal_nan=True)
    return float(apart.masked_fill(same, 0).max())


def assert_same(found: float | None, wanted: float) -> None:
    assert found is not None
    assert found == pytest.approx(wanted, rel=1e-15, abs=0, nan_ok=True)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", each(ALL))
def test_every_pair_of_dtypes(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(reading, "PIECE", 50)
    one = random_tensor(dtype, 10, 20)
    for other_dtype in ALL:
        if hasattr(torch, other_dtype):
            other = random_tensor(other_dtype, 10, 20).flip(0).contiguous()
            assert_same(largest(one, other), by_torch(one, other))
    assert largest(one, one.clone()) == 0


NUMBERS = (0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize(("one", "other"), [*itertools.product(NUMBERS, NUMBERS)])
def test_nan_and_infinities(one: float, other: float) -> None:
    """NaN equals NaN and an infinity equals itself. If only one value is NaN, so is the difference."""
    left, right = torch.tensor([1.0, one]), torch.tensor([1.25, other])
    same = one == other or (math.isnan(one) and math.isnan(other))
    wanted = 0.25 if same else max(0.25, abs(one - other)) if not math.isnan(one - other) else math.nan
    assert largest(left, right) == pytest.approx(wanted, nan_ok=True)
    assert largest(left[1], right[1]) == pytest.approx(0 if same else abs(one - other), nan_ok=True)
    close = torch.isclose(left, right, rtol=0, atol=0.25, equal_nan=True).all()
    found = largest(left, right)
    assert (found is not None and found <= 0.25) == bool(close)


def test_integers_are_exact() -> None:
    ends = torch.tensor([-(2**63), 2**63 - 1]), torch.tensor([2**63 - 1, -(2**63)])
    assert largest(*ends) == 2**64 - 1
    unsigned = torch.tensor([2**64 - 1], dtype=torch.uint64), torch.tensor([2**53 + 1], dtype=torch.uint64)
    assert largest(*unsigned) == 2**64 - 1 - (2**53 + 1)
    assert largest(torch.tensor(True), torch.tensor(False)) == 1
    assert largest(torch.tensor([2**53 + 1]), torch.tensor([2**53])) == 1


axes = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 7)), max_size=3)


@given(axes=axes, piece=st.integers(1, 40))
def test_any_two_views_of_one_shape(axes: list[tuple[int, int, int]], piece: int) -> None:
    shape = [size for size, _, _ in axes]
    base = torch.from_numpy(np.random.default_rng(0).standard_normal(200))
    one = base.as_strided(shape, [stride for _, stride, _ in axes], 3)
    other = base.as_strided(shape, [stride for _, _, stride in axes], 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE", piece)
        assert largest(one, other) == by_torch(one, other)


def test_values_that_are_not_numbers_have_no_difference() -> None:
    entries = value_entries.plain({"w": torch.ones(2)})
    packed = {"w": entries["w"], "p": type(entries["w"])((2,), "float4_e2m1fn_x2", (1,), 0, entries["w"].storage)}
    found = differences.compared({"w": (packed["w"], packed["w"]), "p": (packed["p"], packed["p"])}, lambda _: None)
    assert found == {"w": Difference(0, 0), "p": Difference(None, None)}


tolerances = st.sampled_from((0.0, 1e-3, 0.25, 1.0, 2.0))
elements = st.sampled_from((0.0, -0.0, 1.0, 1.25, -1.0, 4.0, 4.5, 1e30, 1.1e30, math.inf, -math.inf, math.nan))


@given(pairs=st.lists(st.tuples(elements, elements), min_size=1, max_size=5), rtol=tolerances, atol=tolerances)
def test_closeness_agrees_with_torch(pairs: list[tuple[float, float]], rtol: float, atol: float) -> None:
    one, other = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    wanted = torch.isclose(one, other, rtol=rtol, atol=atol, equal_nan=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE", 2)
        assert are_close(one, other, rtol, atol) == bool(wanted.all())


@pytest.mark.parametrize("dtype", INTEGERS)
def test_closeness_of_integers_agrees_with_torch(dtype: str) -> None:
    values = [0, 1] if dtype == "bool" else [0, 1, 2, 50, 100]
    for left, right in itertools.product(values, values):
        one, other = (torch.tensor([value], dtype=getattr(torch, dtype)) for value in (left, right))
        for rtol, atol in ((0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.5, 1.0)):
            wide = one.double(), other.double()
            assert are_close(one, other, rtol, atol) == bool(torch.isclose(*wide, rtol=rtol, atol=atol))


def distance(one: torch.Tensor, other: torch.Tensor) -> differences.Distance:
    entries = value_entries.plain({"one": one, "other": other})
    return differences.distances({"w": (entries["one"], entries["other"])}, lambda _: None)["w"]


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200, 1e-320])
def test_the_relative_l2_difference_is_that_of_torch(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The squares of very small and very large values leave the range of float64; the norms do not."""
    monkeypatch.setattr(reading, "PIECE", 50)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(20, 30, dtype=torch.float64, generator=generator) for _ in range(2))
    found = distance(one * scale, other.T.contiguous().T * scale)
    assert found.relative == pytest.approx(
        float((one - other).norm() / one.norm()), rel=1e-12 if scale > 1e-300 else 0.1
    )
    assert found.norm == pytest.approx(float(one.norm()) * scale, rel=1e-12 if scale > 1e-300 else 0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "uint8", "complex64", "bool"])
def test_the_relative_l2_difference_of_other_dtypes(dtype: str) -> None:
    one = torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    other = one.flip(0).clone()
    wide = torch.complex128 if one.is_complex() else torch.float64
    wanted = (one.to(wide) - other.to(wide)).norm() / one.to(wide).norm()
    assert distance(one, other).relative == pytest.approx(float(wanted), rel=1e-12)


def test_relative_l2_differences_of_special_values() -> None:
    zero, some = torch.zeros(3), torch.tensor([3.0, 0.0, 4.0])
    assert distance(zero, zero).relative == 0
    assert distance(zero, some).relative == math.inf
    assert distance(some, zero).relative == 1
    holes = torch.tensor([math.nan, math.inf, 2.0])
    assert distance(holes, torch.tensor([math.nan, math.inf, 3.0])).relative == 0.5
    assert math.isnan(distance(holes, torch.tensor([1.0, math.inf, 2.0])).relative)
    assert distance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.inf])).relative == math.inf
    both = distance(some, zero).joined(distance(torch.tensor([12.0]), torch.tensor([12.0])))
    assert both.relative == 5 / 13
