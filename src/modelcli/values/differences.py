"""By how much the values of two tensors differ: one pass over both, a bounded piece of them at a time."""

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
    """By how much two tensors differ: 0 where they show the same, None where their elements are no numbers.

    `largest` is `max |a - b|`, and `beyond` is `max(|a - b| - rtol * |b|)`: as in `torch.isclose`, they are close where
    that is at most `atol`.
    """

    largest: float | None
    beyond: float | None

    @classmethod
    def of(cls, largest: float) -> Difference:
        """A difference of which a tolerance takes nothing."""
        return cls(largest, largest)


def compared(
    pairs: Mapping[str, tuple[TensorEntry, TensorEntry]], progress: Callable[[int], None], rtol: float = 0.0
) -> dict[str, Difference]:
    """By how much two tensors of one shape differ, by their name.

    Of floating-point numbers the difference is that of float64, of whole ones it is exact, of complex ones its absolute
    value. Elements are the same where both are NaN; where one is, the difference is NaN. It is None where the elements
    of a dtype are no numbers (float4_e2m1fn_x2): such bytes differ.

    Args:
        pairs: Two views of one shape each, into storages of any kind.
        progress: Called with so many bytes more of the first ones.
        rtol: How large a part of each element of the second tensor is taken off its difference.

    Raises:
        FileFormatError: Where views show far more elements than their storages have, and where a file has changed.
    """
    known = {
        name: _without_repeats(*pair) for name, pair in pairs.items() if all(is_readable(entry.dtype) for entry in pair)
    }
    found: dict[str, tuple[float, float]] = {}
    for name, nbytes, here in each_piece(known, partial(difference, rtol=rtol), "what the tensors of both models view"):
        so_far = found.get(name, here)
        found[name] = _worse(so_far[0], here[0]), _worse(so_far[1], here[1])
        progress(nbytes)
    nothing = {name: Difference.of(0) if name in known else Difference(None, None) for name in pairs}
    return nothing | {name: Difference(*numbers) for name, numbers in found.items()}


def _worse(one: float, other: float) -> float:
    """The larger of two differences; NaN where one is."""
    return other if math.isnan(other) or other > one else one


def _without_repeats(one: TensorEntry, other: TensorEntry) -> tuple[TensorEntry, TensorEntry]:
    """Views in which what both repeat along an axis stands once."""
    steps = zip(one.shape, one.stride, other.stride, strict=True)
    shape = tuple(1 if size > 1 and not left and not right else size for size, left, right in steps)
    return (one, other) if shape == one.shape else (replace(one, shape=shape), replace(other, shape=shape))


def difference(one: Array, other: Array, dtype: str, other_dtype: str, rtol: float = 0.0) -> tuple[float, float]:
    """The `largest` and the `beyond` of the elements of two arrays of one shape, as `Difference` has them."""
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
        # Infinities take away from one another to NaN, too.
        apart[_same(left, right)] = 0
        largest = float(apart.max())
    if not rtol or not largest or math.isnan(largest):
        return (largest, largest) if most is None else (most, largest)
    beyond = apart - rtol * np.abs(right)
    beyond[np.isinf(apart)] = math.inf  # and no tolerance is for that, however large the other element is
    return largest if most is None else most, float(beyond.max())


def _same(one: Array, other: Array) -> Array:
    """Which elements are the same: equal, or both NaN; of complex ones each of their two parts."""
    if one.dtype.kind == "c":
        return _same(one.real, other.real) & _same(one.imag, other.imag)
    same: Array = (one == other) | (np.isnan(one) & np.isnan(other))
    return same


def _of_integers(one: Array, other: Array) -> int:
    """The largest difference of integers, exactly: one of int64 may need 64 bits without a sign."""
    wide = np.uint64 if one.dtype == np.uint64 else np.int64
    left, right = one.astype(wide), other.astype(wide)
    return int((np.maximum(left, right) - np.minimum(left, right)).view(np.uint64).max())
