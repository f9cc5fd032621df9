"""Conversions between dtypes equal `tensor.to(dtype)` bit for bit: every pair, every 8-bit and 16-bit pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modelcli.values import casting
from modelcli.values.dtypes import HELD, LARGEST, bits_of, numpy_dtype, unsigned
from tests.needs import COMPLETE, each, needs, torch_version, what_torch_has

FLOATS = tuple(LARGEST)


def neighbours(bits: np.ndarray) -> np.ndarray:
    """Return the patterns, and those before and after each."""
    return np.concatenate([bits - bits.dtype.type(1), bits, bits + bits.dtype.type(1)])


def float32_patterns() -> np.ndarray:
    """Return all values of narrower dtypes, the midpoints between them, the neighbours of each, and random patterns."""
    generator = np.random.default_rng(0)
    halves = np.arange(2**16, dtype=np.uint32) << 16
    edges = np.concatenate([halves + np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    middles = ((values[:-1] + values[1:]) / 2).astype(np.float32).view(np.uint32)
    ends = np.array([most * scale for most in LARGEST.values() for scale in (1, 1 + 2**-5, 1 + 2**-4, 1 + 2**-3)])
    with np.errstate(over="ignore"):
        ends = np.concatenate([ends, -ends]).astype(np.float32).view(np.uint32)
    anything = generator.integers(0, 2**32, 1_000_000, dtype=np.uint32)
    return np.concatenate(
        [edges, neighbours(middles), values.astype(np.float32).view(np.uint32), neighbours(ends), anything]
    )


def float64_patterns() -> np.ndarray:
    """Return the patterns of float32, the neighbours of each and of its midpoints, and random patterns."""
    generator = np.random.default_rng(1)
    with np.errstate(invalid="ignore"):
        exact = float32_patterns()[::3].view(np.float32).astype(np.float64).view(np.uint64)
    middles = neighbours(exact + np.uint64(1 << 28))
    return np.concatenate([neighbours(exact), middles, generator.integers(0, 2**64, 1_000_000, dtype=np.uint64)])


def patterns(dtype: str) -> np.ndarray:
    """Return elements of a dtype. Their number is a multiple of the width of torch's vector instructions."""
    size = numpy_dtype(dtype).itemsize
    if size == 4:
        bits = float32_patterns()
    elif size == 8:
        bits = float64_patterns()
    else:
        bits = np.arange(2 ** (8 * size), dtype=unsigned(size))
    return bits[: len(bits) // 256 * 256].view(numpy_dtype(dtype))


def by_torch(elements: np.ndarray, before: str, after: str, *, strided: bool = False) -> np.ndarray:
    """Return the bits of torch's conversion. If `strided`, torch converts one element at a time."""
    bits = bits_of(np.repeat(elements, 2) if strided else elements)
    tensor = torch.from_numpy(bits.copy()).view(getattr(torch, before))
    made = (tensor[::2] if strided else tensor).to(getattr(torch, after)).contiguous()
    return made.view(torch.uint8).numpy().view(unsigned(made.element_size()))


def saturates() -> bool:
    """Whether this torch clamps values beyond the range of float8_e4m3fn. Older versions give NaN."""
    found = bool(torch.tensor(1e6).to(torch.float8_e4m3fn).float().isfinite())
    assert found or torch_version() < COMPLETE
    return found


@pytest.mark.parametrize("after", each(FLOATS))
@pytest.mark.parametrize("before", each(FLOATS))
def test_every_pair_of_dtypes_converts_as_torch_does(before: str, after: str) -> None:
    elements = patterns(before)
    found, wanted = bits_of(casting.cast(elements, before, after)), by_torch(elements, before, after)
    different = found != wanted
    if after == "bfloat16" and before in ("float32", "float64"):
        # torch's vector and scalar code differ here. modelcli gives the result of the vector code (on x86 at least).
        nan = np.isnan(elements)
        assert set(found[nan]) == {0xFFFF}
        assert set(wanted[nan]) <= {0xFFFF, 0x7FC0, 0xFFC0}
        different &= ~nan
    if after == "float8_e4m3fn" and not saturates():
        with np.errstate(over="ignore", invalid="ignore"):
            different &= np.abs(elements.astype(np.float64)) <= LARGEST[after]
    where = np.flatnonzero(different)
    assert not len(where), [tuple(hex(bits[i]) for bits in (bits_of(elements), found, wanted)) for i in where[:5]]


@pytest.mark.parametrize(
    "after",
    [
        *each(("float16", "float8_e5m2", "float8_e8m0fnu", "float32")),
        pytest.param("float8_e4m3fn", marks=needs("a torch that brings to its end what it cannot hold", saturates())),
    ],
)
@pytest.mark.parametrize("before", ["float16", "bfloat16", "float8_e5m2"])
def test_single_elements_convert_as_blocks_do(before: str, after: str) -> None:
    elements = patterns(before)
    found = bits_of(casting.cast(elements, before, after))
    assert np.array_equal(found, by_torch(elements, before, after, strided=True))


@pytest.mark.parametrize("length", [0, 1, 7, 255, 256, 257, 1000])
def test_block_boundaries_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    elements = np.linspace(-500, 500, length, dtype=np.float32)
    for after in FLOATS:
        whole = bits_of(casting.cast(elements, "float32", after))
        with monkeypatch.context() as patch:
            patch.setattr(casting, "BLOCK", 256)
            assert np.array_equal(bits_of(casting.cast(elements, "float32", after)), whole)


def test_the_input_of_a_conversion_is_unchanged() -> None:
    for before in FLOATS:
        elements = patterns(before)[:65536]
        kept = bits_of(elements).copy()
        for after in FLOATS:
            made = casting.cast(elements, before, after)
            assert not np.shares_memory(made, elements)
        assert np.array_equal(bits_of(elements), kept)


def test_every_supported_dtype_has_torchs_size() -> None:
    for dtype in what_torch_has(HELD):
        assert numpy_dtype(dtype).itemsize == getattr(torch, dtype).itemsize
    for dtype in what_torch_has(LARGEST):
        assert torch.finfo(getattr(torch, dtype)).max == LARGEST[dtype]


@pytest.mark.parametrize("before", FLOATS)
def test_overflowing_values_are_found(before: str) -> None:
    """The values beyond the range are those that torch's result shows, and their number is right."""
    for after in FLOATS:
        elements = patterns(before)[: 1 << 17]
        with np.errstate(invalid="ignore"):
            wide = torch.from_numpy(elements.astype(np.float64))
            made = torch.from_numpy(casting.cast(elements, before, after).astype(np.float64))
        lost = casting.lost_in(elements, before, after)
        assert lost[0] == int((wide.isfinite() & made.isinf()).sum())
        assert lost[1] == int((~wide.isnan() & made.isnan()).sum())
        beyond = (wide.abs() > LARGEST[after]) & made.isfinite()
        assert lost[2] == (int(beyond.sum()) if after == "float8_e4m3fn" else 0)
        if any(lost) and casting.narrows(before, after):
            assert casting.may_exceed(elements, before, after)


@pytest.mark.parametrize("value", [448.0, -448.0, 464.0, 464.0001, -465.0, 1e6, float("inf"), float("nan"), 0.0])
@pytest.mark.parametrize("before", ["float64", "float32", "float16", "bfloat16", "float8_e5m2"])
def test_one_value_beyond_the_range_among_many(before: str, value: float) -> None:
    with np.errstate(over="ignore"):
        elements = np.array([0.5] * 99 + [value], np.float64).astype(numpy_dtype(before))
    number = float(elements[-1])
    assert casting.may_exceed(elements, before, "float8_e4m3fn") >= any(
        casting.lost_in(elements, before, "float8_e4m3fn")
    )
    assert casting.lost_in(elements, before, "float8_e4m3fn")[2] == (abs(number) > 448)
