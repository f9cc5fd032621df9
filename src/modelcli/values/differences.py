"""Measure by how much the values of two tensors differ, in one pass over both that reads them in bounded pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from modelcli.checkpoints.entries import TensorEntry
from modelcli.values.dtypes import INTEGERS, Array
from modelcli.values.passes import each_piece
from modelcli.values.reading import is_readable


@dataclass(frozen=True, slots=True)
class Difference:
    """By how much two tensors differ.

    Attributes:
        largest: `max |a - b|`; 0 for equal tensors, None if the elements cannot be read as numbers.
        beyond: `max(|a - b| - rtol * |b|)`. As in `torch.isclose`, two tensors are close if it is at most `atol`.
    """

    largest: float | None
    beyond: float | None

    @classmethod
    def of(cls, largest: float) -> Difference:
        """Return a difference without a relative tolerance."""
        return cls(largest, largest)


def compared(
    pairs: Mapping[str, tuple[TensorEntry, TensorEntry]], progress: Callable[[int], None], rtol: float = 0.0
) -> dict[str, Difference]:
    """Return by how much the two tensors of each pair differ.

    Differences of floating-point values are computed in float64, those of integers exactly, and those of complex values
    as absolute values. Two NaNs are equal; a NaN and another value differ by NaN.

    Args:
        pairs: two tensors of the same shape, by name.
        progress: called with the number of further bytes of the first tensors that are done.
        rtol: the relative tolerance.

    Returns:
        The differences by name; None values for dtypes that cannot be read as numbers (float4_e2m1fn_x2).

    Raises:
        FileFormatError: views show far more elements than their storages have, or a file has changed.
    """
    known = {
        name: _without_repeats(*pair) for name, pair in pairs.items() if all(is_readable(entry.dtype) for entry in pair)
    }
    found: dict[str, tuple[float, float]] = {}
    for name, nbytes, here in each_piece(known, partial(difference, rtol=rtol), "what the tensors of both models view"):
        so_far = found.get(name, here)
        found[name] = _worse(so_far[0], here[0]), _worse(so_far[1], here[1])
        progress(nbytes)
    defaults = {name: Difference.of(0) if name in known else Difference(None, None) for name in pairs}
    return defaults | {name: Difference(*measured) for name, measured in found.items()}


def _worse(one: float, other: float) -> float:
    """Return the larger of two differences; NaN if one of them is NaN."""
    return other if math.isnan(other) or other > one else one


def _without_repeats(one: TensorEntry, other: TensorEntry) -> tuple[TensorEntry, TensorEntry]:
    """Return views without the repeats along an axis that both tensors have."""
    steps = zip(one.shape, one.stride, other.stride, strict=True)
    shape = tuple(1 if size > 1 and not left and not right else size for size, left, right in steps)
    return (one, other) if shape == one.shape else (replace(one, shape=shape), replace(other, shape=shape))


def difference(one: Array, other: Array, dtype: str, other_dtype: str, rtol: float = 0.0) -> tuple[float, float]:
    """Return `largest` and `beyond` of `Difference` for two arrays of the same shape."""
    one, other = one.reshape(-1), other.reshape(-1)
    kinds = {dtype, other_dtype}
    if kinds <= INTEGERS and ("uint64" not in kinds or len(kinds) == 1):
        most = _of_integers(one, other)
        if not (rtol and most):
            return most, most
    else:
        most = None
    wide = np.complex128 if one.dtype.kind == "c" or other.dtype.kind == "c" else np.float64
    left, right = one.astype(wide), other.astype(wide)
    apart = np.abs(left - right)
    largest = float(apart.max())
    if math.isnan(largest):
        # The difference of two equal infinities is NaN, too.
        apart[_same(left, right)] = 0
        largest = float(apart.max())
    if not rtol or not largest or math.isnan(largest):
        return (largest, largest) if most is None else (most, largest)
    beyond = apart - rtol * np.abs(right)
    beyond[np.isinf(apart)] = math.inf  # no tolerance covers an infinite difference, however large the other element is
    return largest if most is None else most, float(beyond.max())


def _same(one: Array, other: Array) -> Array:
    """Return which elements are equal or both NaN; for complex elements both parts must be so."""
    if one.dtype.kind == "c":
        return _same(one.real, other.real) & _same(one.imag, other.imag)
    same: Array = (one == other) | (np.isnan(one) & np.isnan(other))
    return same


def _of_integers(one: Array, other: Array) -> int:
    """Return the exact largest difference of integers. For int64 it may need all 64 bits of an unsigned integer."""
    wide = np.uint64 if one.dtype == np.uint64 else np.int64
    left, right = one.astype(wide), other.astype(wide)
    return int((np.maximum(left, right) - np.minimum(left, right)).view(np.uint64).max())
