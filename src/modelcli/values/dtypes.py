"""Find NumPy's dtypes for the dtypes of torch, by name.

NumPy has no bfloat16 and no float8; `ml_dtypes` adds them. Other dtypes that neither has (quantized and packed ones,
complex32) need torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

INTEGERS = frozenset(("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))))
_COMPLEX = frozenset(("complex64", "complex128"))
#: The largest finite value of each floating-point dtype that values can be converted to, as `torch.finfo(dtype).max`.
LARGEST: Mapping[str, float] = {
    "float64": (2 - 2.0**-52) * 2.0**1023,
    "float32": (2 - 2.0**-23) * 2.0**127,
    "float16": 65504.0,
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
    "float8_e4m3fn": 448.0,
    "float8_e5m2": 57344.0,
    "float8_e4m3fnuz": 240.0,
    "float8_e5m2fnuz": 57344.0,
    "float8_e8m0fnu": 2.0**127,
}
FLOATS = frozenset(LARGEST)
#: All dtypes that NumPy has with `ml_dtypes`.
HELD = INTEGERS | _COMPLEX | FLOATS
_OF_NUMPY = INTEGERS | _COMPLEX | {"float64", "float32", "float16"}
_UNSIGNED: Mapping[int, np.dtype[Any]] = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def is_held(dtype: str) -> bool:
    """Whether NumPy has a dtype of this name, with `ml_dtypes`. Any other dtype needs torch."""
    return dtype in HELD


@cache
def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Return NumPy's dtype for a dtype of torch. Raises KeyError for a dtype that is not in `HELD`."""
    if dtype in _OF_NUMPY:
        return np.dtype(dtype)
    if dtype not in HELD:
        raise KeyError(dtype)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype))
    return found


def bits_of(elements: Array) -> Array:
    """Return the same memory as unsigned integers of the same size."""
    found: Array = elements.view(_UNSIGNED[elements.itemsize])
    return found


def unsigned(nbytes: int) -> np.dtype[Any]:
    """Return the unsigned integer dtype of 1, 2, 4 or 8 bytes."""
    return _UNSIGNED[nbytes]
