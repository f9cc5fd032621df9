"""A histogram made in pieces is the one that NumPy makes of the whole tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelcli.live import value_entries
from modelcli.values import histograms, reading, statistics
from modelcli.values.histograms import BINS, Histogram
from tests.needs import each
from tests.values.test_statistics import COMPLEX, FLOATS, FLOATS_OF_A_BYTE, INTEGERS, random_tensor


def histogram(tensor: torch.Tensor) -> Histogram | None:
    entries = value_entries.plain({"w": tensor})
    return histograms.collect(entries, statistics.collect(entries)).get("w")


def by_numpy(tensor: torch.Tensor) -> tuple[list[int], float, float]:
    """Return what NumPy makes of all finite elements at once."""
    wide = tensor.to(torch.complex128).abs() if tensor.is_complex() else tensor.to(torch.float64)
    numbers = wide[wide.isfinite()].numpy()
    counts, edges = np.histogram(numbers, BINS)
    return counts.tolist(), edges[0], edges[-1]


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", each((*INTEGERS, *FLOATS, *FLOATS_OF_A_BYTE, *COMPLEX)))
def test_every_dtype(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(reading, "PIECE", 50)
    tensor = random_tensor(dtype, 20, 30)
    found = histogram(tensor)
    assert found is not None
    if tensor.is_complex():  # NumPy and torch differ in the last bit of an absolute value
        assert sum(found.counts) == sum(by_numpy(tensor)[0])
    else:
        assert (list(found.counts), found.low, found.high) == by_numpy(tensor)


@given(
    values=st.lists(st.floats(width=32) | st.sampled_from((0.0, math.nan, math.inf)), max_size=60),
    piece=st.integers(1, 70),
)
def test_any_values(values: list[float], piece: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE", piece)
        found = histogram(tensor)
    if not tensor.isfinite().any():
        assert found is None
        return
    assert found is not None
    if len(found.counts) == BINS:
        assert (list(found.counts), found.low, found.high) == by_numpy(tensor)
    else:  # NumPy refuses such a range
        with pytest.raises(ValueError, match="Too many bins"):
            by_numpy(tensor)
        assert sum(found.counts) == tensor.isfinite().sum()


def test_ranges_that_float64_cannot_divide() -> None:
    for low, high in ((1e300, math.nextafter(1e300, math.inf)), (-1.7e308, 1.7e308), (1e300, 1e300)):
        found = histogram(torch.tensor([low, high], dtype=torch.float64))
        assert found is not None
        assert found.counts == (2,)


def test_an_expanded_tensor_counts_each_element() -> None:
    found = histogram(torch.tensor([[1.0], [2.0]]).expand(2, 5))
    assert found is not None
    assert (found.counts[0], found.counts[-1], sum(found.counts)) == (5, 5, 10)
