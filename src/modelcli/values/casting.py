"""Convert elements from one floating-point dtype to another, bit for bit as `tensor.to(dtype)` of torch 2.14 does.

torch converts through float32, so it rounds float64 twice for any narrower dtype. Values beyond the range of
float8_e4m3fn become its largest value (older releases made them NaN). `ml_dtypes` and NumPy differ from torch in:

- float64 to float16 and narrower: they round once, torch twice;
- overflow to float8_e4m3fn: they return NaN, torch the largest value;
- float8_e8m0fnu: they turn zero and negative values into NaN; torch drops the sign and rounds halves up;
- the bits of NaN: torch (that is, the processor) sets the quiet bit and keeps the payload of float16; `ml_dtypes`
  has only one NaN.

This module corrects these differences; `tests/values/test_casting.py` compares every 8-bit and 16-bit pattern of every
pair of dtypes.

In one case torch's results differ: a NaN of float32 or float64 becomes the bfloat16 0xFFFF with vector instructions on
x86, and 0x7FC0 without them. This module returns 0xFFFF, as torch does for contiguous tensors on x86.
"""

from __future__ import annotations

from functools import cache
from math import isnan

import numpy as np

from modelcli.values.dtypes import FLOATS, LARGEST, Array, bits_of, numpy_dtype, unsigned

#: The elements to convert at a time, few enough for the intermediate results to stay in the processor's cache.
BLOCK = 1 << 16

_HALF_NAN, _HALF_INFINITY = 0x7FC0, 0x7F80
_VECTOR_NAN = 0xFFFF
#: The dtypes for which overflow gives the largest finite value.
_SATURATING = frozenset(("float8_e4m3fn",))
#: The numbers of values that become Inf, NaN, and the largest finite value of the narrower dtype.
Lost = tuple[int, int, int]


def can_cast(before: str, after: str) -> bool:
    """Whether `cast` can convert between two dtypes: both are floating-point and not packed."""
    return before in FLOATS and after in FLOATS


def cast(elements: Array, before: str, after: str) -> Array:
    """Convert a contiguous one-dimensional array from dtype `before` to dtype `after`, in new memory.

    Raises KeyError if `can_cast(before, after)` is false.
    """
    made = np.empty(elements.shape, numpy_dtype(after))
    with np.errstate(all="ignore"):
        for start in range(0, len(elements), BLOCK):
            _cast_block(elements[start : start + BLOCK], before, after, made[start : start + BLOCK])
    return made


def _cast_block(elements: Array, before: str, after: str, made: Array) -> None:
    if before == after:
        made[:] = elements
    elif before == "bfloat16" and after == "float32":
        np.left_shift(bits_of(elements), 16, out=bits_of(made), dtype=np.uint32)
    elif elements.itemsize <= 2:
        np.take(_table(before, after), bits_of(elements), out=bits_of(made), mode="clip")
    elif before == "float64":
        _cast_block(elements.astype(np.float32), "float32", after, made)
    elif after == "bfloat16":
        _round_to_bfloat16(elements, bits_of(made))
    elif made.itemsize == 1:
        np.take(_table("bfloat16", after), _rounded_to_odd(elements), out=bits_of(made), mode="clip")
    else:
        bits_of(made)[:] = _from_float32(elements, after)


def _round_to_bfloat16(elements: Array, made: Array) -> None:
    """Round float32 to the nearest bfloat16, ties to even: add 0x7FFF, and 1 more if the upper half is odd."""
    bits = bits_of(elements)
    work = bits >> 16
    work &= 1
    work += 0x7FFF
    work += bits
    made[:] = work.view(np.uint16)[1::2]
    if isnan(elements.max()):
        made[np.isnan(elements)] = _VECTOR_NAN


def _rounded_to_odd(elements: Array) -> Array:
    """Return the upper half of each float32, with the last bit set if the lower half is not zero.

    Rounding this to at most five bits of mantissa gives the same result as rounding the float32: S. Boldo, G. Melquiond
    "When Double Rounding is Odd", IMACS 2005.
    """
    halves = elements.view(np.uint16)
    odd: Array = np.bitwise_or(halves[1::2], halves[::2] != 0, dtype=np.uint16, casting="unsafe")
    return odd


@cache
def _table(before: str, after: str) -> Array:
    """Return the bits in dtype `after` for each bit pattern of a dtype of one or two bytes."""
    floats = _as_float32(before)
    made = _from_float32(floats, after)
    if after == "bfloat16":
        made[np.isnan(floats)] = _HALF_NAN
    return made


@cache
def _as_float32(before: str) -> Array:
    """Return each bit pattern of a dtype of one or two bytes as float32, with the same NaN bits as torch."""
    size = numpy_dtype(before).itemsize
    patterns = np.arange(1 << 8 * size, dtype=np.uint32)
    if before == "bfloat16":
        return (patterns << 16).view(np.float32)
    if before == "float8_e5m2":  # the upper half of float16
        floats: Array = _as_float32("float16")[patterns << 8]
        return floats
    floats = patterns.astype(unsigned(size)).view(numpy_dtype(before)).astype(np.float32)
    bits, nan = bits_of(floats), np.isnan(floats)
    if before == "float16":
        sign, payload = (patterns & 0x8000) << 16, (patterns & 0x3FF) << 13
        bits[nan] = (sign | 0x7FC00000 | payload)[nan]
    elif before == "float8_e4m3fn":
        bits[nan] = (patterns << 24 & 0x80000000 | 0x7FF00000)[nan]
    else:  # the others have one NaN, without a sign
        bits[nan] = 0x7F800001
    return floats


def _from_float32(floats: Array, after: str) -> Array:
    """Return the bits of float32 values in another dtype. The caller sets the NaNs of bfloat16."""
    bits = bits_of(floats)
    if after == "float32":
        return bits.copy()
    if after == "bfloat16":
        made = np.empty(floats.shape, np.uint16)
        _round_to_bfloat16(floats, made)
        return made
    if after == "float8_e8m0fnu":
        return _exponents(bits)
    if after in _SATURATING:
        floats = np.clip(floats, -LARGEST[after], LARGEST[after])
    made = bits_of(floats.astype(numpy_dtype(after)))
    if after == "float8_e5m2":
        made[(made & 0x7F) > 0x7C] |= 3
    elif after == "float16" and isnan(floats.max()):
        nan = np.isnan(floats)
        made[nan] = (bits[nan] >> 16 & 0x8000) | 0x7E00 | (bits[nan] >> 13 & 0x3FF)
    return made


def _exponents(bits: Array) -> Array:
    """Return the bits of float8_e8m0fnu, which has only an exponent: the nearest power of two, halves rounded up."""
    positive = bits & 0x7FFFFFFF
    rounded = (positive + 0x400000) >> 23
    rounded[positive == 0x400000] = 0  # the middle one of the subnormal numbers is rounded down
    exponents: Array = np.minimum(rounded, 0xFF).astype(np.uint8)
    return exponents


# --- what a dtype cannot hold ----------------------------------------------------------------------------------------


def narrows(before: str, after: str) -> bool:
    """Whether the dtype `after` has a smaller range than `before`."""
    return LARGEST[after] < LARGEST[before]


def may_exceed(elements: Array, before: str, after: str) -> bool:
    """Whether an element may be NaN or beyond the range of a dtype. Only the extremes are computed."""
    if not (len(elements) and narrows(before, after)):
        return False
    if elements.itemsize == 1:
        return any(lost_in(elements, before, after))
    most = LARGEST[after]
    if elements.itemsize == 2:  # without their signs the bits are in the order of the values
        end = bits_of(np.array([most], np.float64).astype(elements.dtype))[0]
        return bool((bits_of(elements) & 0x7FFF).max() > end)
    return not (-most <= elements.min() and elements.max() <= most)


def lost_in(elements: Array, before: str, after: str) -> Lost:
    """Count the finite values that become Inf, the values that become NaN, and those that become the largest value."""
    flat = np.ascontiguousarray(elements).reshape(-1)
    with np.errstate(all="ignore"):
        made = cast(flat, before, after).astype(np.float64)
        wide = flat.astype(np.float64)
        beyond = np.abs(wide) > LARGEST[after]
    inf = int(np.count_nonzero(np.isfinite(wide) & np.isinf(made)))
    nan = int(np.count_nonzero(~np.isnan(wide) & np.isnan(made)))
    clamped = int(np.count_nonzero(beyond & np.isfinite(made))) if after in _SATURATING else 0
    return inf, nan, clamped
