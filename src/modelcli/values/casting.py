"""Elements of one floating-point dtype as another: bit for bit what `tensor.to(dtype)` of torch 2.14 gives.

torch converts through float32, so float64 is rounded twice on its way to anything narrower, and it brings what
float8_e4m3fn cannot hold to its end (older releases made it NaN). `ml_dtypes` and NumPy differ from it in:

- float64 to float16 and narrower: they round once, torch twice;
- overflow to float8_e4m3fn: they give NaN, torch gives the largest value;
- float8_e8m0fnu: they make NaN of zero and of negative values; torch leaves the sign out, and rounds halves up;
- the bits of NaN: torch (that is, the processor) sets the quiet bit and keeps the payload of float16; `ml_dtypes`
  makes one NaN of them all.

All of it is mended here, and `tests/values/test_casting.py` compares every 8-bit and 16-bit pattern of every pair.

There is one thing in which torch does not agree with itself: a NaN of float32 or float64 that becomes bfloat16 is
0xFFFF from its vector instructions on x86, and 0x7FC0 where it does not use them. It is 0xFFFF here, which contiguous
tensors have on x86.
"""

from __future__ import annotations

from functools import cache
from math import isnan

import numpy as np

from modelcli.values.dtypes import FLOATS, LARGEST, Array, bits_of, numpy_dtype, unsigned

#: Elements converted at a time: what is made of them on the way stays in the processor's cache.
BLOCK = 1 << 16

_HALF_NAN, _HALF_INFINITY = 0x7FC0, 0x7F80
_VECTOR_NAN = 0xFFFF
#: The dtypes whose overflow becomes the largest finite value.
_SATURATING = frozenset(("float8_e4m3fn",))
#: Values that become Inf, become NaN, and become the largest finite value of the narrower dtype.
Lost = tuple[int, int, int]


def can_cast(before: str, after: str) -> bool:
    """Whether elements of one dtype can be converted to another here: both are floating-point and no packed ones."""
    return before in FLOATS and after in FLOATS


def cast(elements: Array, before: str, after: str) -> Array:
    """The elements of a contiguous array of one dimension, of dtype `before`, as `after`, in new memory.

    Raises KeyError where not `can_cast(before, after)`.
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
    """Round float32 to the nearest bfloat16, ties to even: half of the last place less one is added, and one if odd."""
    bits = bits_of(elements)
    work = bits >> 16
    work &= 1
    work += 0x7FFF
    work += bits
    made[:] = work.view(np.uint16)[1::2]
    if isnan(elements.max()):
        made[np.isnan(elements)] = _VECTOR_NAN


def _rounded_to_odd(elements: Array) -> Array:
    """The upper half of each float32, made odd where the lower half is not zero.

    To round that to at most five bits of mantissa is to round the float32 itself. S. Boldo, G. Melquiond, "When Double
    Rounding is Odd", IMACS 2005.
    """
    halves = elements.view(np.uint16)
    odd: Array = np.bitwise_or(halves[1::2], halves[::2] != 0, dtype=np.uint16, casting="unsafe")
    return odd


@cache
def _table(before: str, after: str) -> Array:
    """The bits of `after` for each pattern of the bits of a dtype of one or two bytes."""
    numbers = _as_float32(before)
    made = _from_float32(numbers, after)
    if after == "bfloat16":
        made[np.isnan(numbers)] = _HALF_NAN
    return made


@cache
def _as_float32(before: str) -> Array:
    """Each pattern of the bits of a dtype of one or two bytes as torch's float32, the bits of NaN included."""
    size = numpy_dtype(before).itemsize
    patterns = np.arange(1 << 8 * size, dtype=np.uint32)
    if before == "bfloat16":
        return (patterns << 16).view(np.float32)
    if before == "float8_e5m2":  # the upper half of float16
        numbers: Array = _as_float32("float16")[patterns << 8]
        return numbers
    numbers = patterns.astype(unsigned(size)).view(numpy_dtype(before)).astype(np.float32)
    bits, nan = bits_of(numbers), np.isnan(numbers)
    if before == "float16":
        sign, payload = (patterns & 0x8000) << 16, (patterns & 0x3FF) << 13
        bits[nan] = (sign | 0x7FC00000 | payload)[nan]
    elif before == "float8_e4m3fn":
        bits[nan] = (patterns << 24 & 0x80000000 | 0x7FF00000)[nan]
    else:  # the others have one NaN, without a sign
        bits[nan] = 0x7F800001
    return numbers


def _from_float32(numbers: Array, after: str) -> Array:
    """The bits of float32 values as another dtype. The NaNs of bfloat16 are the caller's."""
    bits = bits_of(numbers)
    if after == "float32":
        return bits.copy()
    if after == "bfloat16":
        made = np.empty(numbers.shape, np.uint16)
        _round_to_bfloat16(numbers, made)
        return made
    if after == "float8_e8m0fnu":
        return _exponents(bits)
    if after in _SATURATING:
        numbers = np.clip(numbers, -LARGEST[after], LARGEST[after])
    made = bits_of(numbers.astype(numpy_dtype(after)))
    if after == "float8_e5m2":
        made[(made & 0x7F) > 0x7C] |= 3
    elif after == "float16" and isnan(numbers.max()):
        nan = np.isnan(numbers)
        made[nan] = (bits[nan] >> 16 & 0x8000) | 0x7E00 | (bits[nan] >> 13 & 0x3FF)
    return made


def _exponents(bits: Array) -> Array:
    """float8_e8m0fnu has an exponent and nothing else: the nearest power of two, from the middle on the greater."""
    positive = bits & 0x7FFFFFFF
    rounded = (positive + 0x400000) >> 23
    rounded[positive == 0x400000] = 0  # of the subnormal numbers the middle one goes down
    exponents: Array = np.minimum(rounded, 0xFF).astype(np.uint8)
    return exponents


# --- what a dtype cannot hold ----------------------------------------------------------------------------------------


def narrows(before: str, after: str) -> bool:
    """Whether a dtype has a smaller range than another."""
    return LARGEST[after] < LARGEST[before]


def may_exceed(elements: Array, before: str, after: str) -> bool:
    """Whether something among elements is beyond the range of a dtype, or NaN: one look at the least and greatest."""
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
    """How many finite values became Inf, values became NaN, and values became the largest of a saturating dtype."""
    flat = np.ascontiguousarray(elements).reshape(-1)
    with np.errstate(all="ignore"):
        made = cast(flat, before, after).astype(np.float64)
        wide = flat.astype(np.float64)
        beyond = np.abs(wide) > LARGEST[after]
    inf = int(np.count_nonzero(np.isfinite(wide) & np.isinf(made)))
    nan = int(np.count_nonzero(~np.isnan(wide) & np.isnan(made)))
    clamped = int(np.count_nonzero(beyond & np.isfinite(made))) if after in _SATURATING else 0
    return inf, nan, clamped
