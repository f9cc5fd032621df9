"""Measure by how much the values of two tensors differ, in one pass over both that reads them in bounded pieces.

`compared` finds the largest difference of two elements, `distances` the length of the difference as a vector.
"""

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


@dataclass(frozen=True, slots=True)
class Distance:
    """The L2 norms of a tensor and of its difference to another one.

    Attributes:
        difference: `||a - b||2`; NaN or infinite if an element is so in one of the two tensors alone.
        norm: `||a||2`.

    Both are over the elements that are not the same infinity or NaN in both tensors.
    """

    difference: float
    norm: float

    @property
    def relative(self) -> float:
        """`||a - b||2 / ||a||2`: 0 without a difference, infinite if only `a` is zero."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.norm if self.norm else self.difference * math.inf

    def joined(self, other: Distance) -> Distance:
        """Return the distance of both tensors taken as one vector."""
        return Distance(math.hypot(self.difference, other.difference), math.hypot(self.norm, other.norm))


def distances(
    pairs: Mapping[str, tuple[TensorEntry, TensorEntry]], progress: Callable[[int], None]
) -> dict[str, Distance]:
    """Return the L2 norm of the difference of the two tensors `a` and `b` of each pair, and that of `a`.

    The relative L2 difference is `||a - b||2 / ||a||2` (`Distance.relative`). It is computed in float64, or complex128;
    each piece is scaled by its largest element where squares would leave the range of float64.

    Args:
        pairs: two tensors of the same shape, by name.
        progress: called with the number of further bytes of the first tensors that are done.

    Returns:
        The distances by name, without dtypes that cannot be read as numbers (float4_e2m1fn_x2).

    Raises:
        FileFormatError: views show far more elements than their storages have, or a file has changed.
    """
    known = {name: pair for name, pair in pairs.items() if all(is_readable(entry.dtype) for entry in pair)}
    found = dict.fromkeys(known, Distance(0.0, 0.0))
    for name, nbytes, here in each_piece(known, _distance, "what the tensors of both models view"):
        found[name] = found[name].joined(here)
        progress(nbytes)
    return found


def _distance(one: Array, other: Array, _dtype: str, _other_dtype: str) -> Distance:
    """Return the distance of two arrays of the same shape."""
    wide = np.complex128 if one.dtype.kind == "c" or other.dtype.kind == "c" else np.float64
    left, right = one.reshape(-1).astype(wide), other.reshape(-1).astype(wide)
    apart, size = np.abs(left - right), np.abs(left)
    if not math.isfinite(float(apart.sum()) + float(size.sum())):
        same = _same(left, right) & ~np.isfinite(size)
        apart[same] = size[same] = 0
    return Distance(_norm(apart), _norm(size))


def _norm(sizes: Array) -> float:
    """Return the L2 norm of absolute values. They are scaled if the sum of their squares has left the normal range."""
    squared = float(np.dot(sizes, sizes))
    if 1e-280 < squared < math.inf:
        return math.sqrt(squared)
    largest = float(sizes.max())
    if not largest or not math.isfinite(largest):
        return largest
    scaled = sizes / largest
    return largest * math.sqrt(float(np.dot(scaled, scaled)))


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
