"""By how much the values of two tensors differ: one pass over both, a bounded piece of them at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from modelcli.checkpoints.entries import TensorEntry
from modelcli.values.dtypes import INTEGERS, Array
from modelcli.values.passes import each_piece
from modelcli.values.reading import is_readable


def largest(
    pairs: Mapping[str, tuple[TensorEntry, TensorEntry]], progress: Callable[[int], None]
) -> dict[str, float | None]:
    """`max |a - b|` of two tensors of one shape, by their name: 0 where they show the same.

    Of floating-point numbers the difference is that of float64, of whole ones it is exact, of complex ones its absolute
    value. Elements are the same where both are NaN; where one is, the largest difference is NaN. It is None where the
    elements of a dtype are no numbers (float4_e2m1fn_x2): such bytes differ.

    Args:
        pairs: Two views of one shape each, into storages of any kind.
        progress: Called with so many bytes more of the first ones.

    Raises:
        FileFormatError: Where views show far more elements than their storages have, and where a file has changed.
    """
    known = {
        name: _without_repeats(*pair) for name, pair in pairs.items() if all(is_readable(entry.dtype) for entry in pair)
    }
    found: dict[str, float | None] = {name: 0 if name in known else None for name in pairs}
    for name, nbytes, here in each_piece(known, difference, "what the tensors of both models view"):
        most = found[name] or 0
        found[name] = here if math.isnan(here) or here > most else most
        progress(nbytes)
    return found


def _without_repeats(one: TensorEntry, other: TensorEntry) -> tuple[TensorEntry, TensorEntry]:
    """Views in which what both repeat along an axis stands once."""
    steps = zip(one.shape, one.stride, other.stride, strict=True)
    shape = tuple(1 if size > 1 and not left and not right else size for size, left, right in steps)
    return (one, other) if shape == one.shape else (replace(one, shape=shape), replace(other, shape=shape))


def difference(one: Array, other: Array, dtype: str, other_dtype: str) -> float:
    """The largest difference of the elements of two arrays of one shape, as `largest` defines it."""
    one, other = one.reshape(-1), other.reshape(-1)
    kinds = {dtype, other_dtype}
    if kinds <= INTEGERS and ("uint64" not in kinds or len(kinds) == 1):
        return _of_integers(one, other)
    wide = np.complex128 if one.dtype.kind == "c" or other.dtype.kind == "c" else np.float64
    left, right = one.astype(wide), other.astype(wide)
    apart = np.abs(left - right)
    most = float(apart.max())
    if not math.isnan(most):
        return most
    # Infinities take away from one another to NaN, too.
    apart[_same(left, right)] = 0
    return float(apart.max())


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
