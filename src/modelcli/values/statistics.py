"""Compute statistics of tensors in one pass over their bytes, in bounded pieces on several threads.

Each thread has one piece in memory, as it is in the file and as float64: at most 6 MiB together. It reads small tensors
1 MiB at a time. Only a few numbers of each piece are kept.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cache

import numpy as np

from modelcli import ranks
from modelcli.checkpoints.entries import TensorEntry
from modelcli.ranks.shared_work import shared
from modelcli.values.dtypes import INTEGERS, Array, bits_of, numpy_dtype
from modelcli.values.passes import each_piece
from modelcli.values.reading import is_readable, nbytes_shown, without_repeats

#: The statistics `min`, `max`, `mean`, `std`, `zeros`, `nan` and `inf` by name; None for one that is not defined.
Statistics = dict[str, float | None]

#: Called with the number of bytes done, and the total.
Progress = Callable[[int, int], None]


def silent(_done: int, _total: int) -> None:
    """Ignore the progress."""


def collect(
    tensors: Mapping[str, TensorEntry], progress: Progress = silent, what: str = "the model"
) -> dict[str, Statistics]:
    """Return `min`, `max`, `mean`, `std`, `zeros`, `nan` and `inf` of each tensor, by name.

    The first four are those of the finite elements; the last three count elements. `mean` and `std` are computed in
    float64 and merged over the pieces (see `Moments.merged`). They agree with torch to twelve digits of the largest
    element, because torch adds in another order. `std` has Bessel's correction, as `torch.std`. For complex values the
    statistics are those of the absolute values, whose last bit may differ from torch.

    A statistic is None if it is not defined: the first four without finite elements, `std` for a single element, and
    any that exceeds float64. Dtypes that are not numbers to torch (float4_e2m1fn_x2, quantized ones) are left out. A
    tensor with several names is read once.

    Args:
        tensors: the tensors by name.
        progress: called with the number of bytes done, and the total.
        what: the name of the model in error messages.

    Raises:
        FileFormatError: views show far more elements than their storages have, or a file has changed.
    """
    return {name: found.statistics() for name, found in _moments(tensors, moments_of, progress, what).items()}


def not_finite(
    tensors: Mapping[str, TensorEntry], progress: Progress = silent, what: str = "the model"
) -> dict[str, Statistics]:
    """Return the `nan` and `inf` of `collect` for each tensor, without the other statistics.

    Integer tensors are not read. Arguments and errors are those of `collect`.
    """
    others = {name: entry for name, entry in tensors.items() if entry.dtype not in INTEGERS}
    found = _moments(others, count_not_finite, progress, what)
    found |= {name: Moments() for name in tensors if name not in others}
    return {name: {"nan": found[name].nan, "inf": found[name].inf} for name in tensors if name in found}


def _moments(
    tensors: Mapping[str, TensorEntry], work: Callable[[Array, str], Moments], progress: Progress, what: str
) -> dict[str, Moments]:
    """Return the moments of each tensor, merged from those of its pieces by `work`. Each view is read once."""
    names: dict[object, list[str]] = defaultdict(list)
    for name, entry in tensors.items():
        if is_readable(entry.dtype):
            names[entry.view or name].append(name)
    once = {first: without_repeats(tensors[first]) for first, *_ in names.values()}
    sizes, group = [nbytes_shown(entry) for entry, _ in once.values()], ranks.current()
    total = sum(sizes)
    progress(0, total)

    def of_part(part: Mapping[str, tuple[TensorEntry, int]]) -> dict[str, Moments]:
        merged: dict[str, Moments] = {}
        done = 0
        for name, nbytes, more in each_piece({name: (entry,) for name, (entry, _) in part.items()}, work, what):
            merged[name] = merged[name].merged(more) if name in merged else more
            done += nbytes
            progress(group.moved(done, total), total)
        return merged

    found = shared(once, list(once), sizes, of_part, group, pack=astuple, unpack=lambda fields: Moments(*fields))
    for first, *others in names.values():
        moments = found.get(first, Moments()).repeated(once[first][1])
        found |= dict.fromkeys((first, *others), moments)
    return {name: found[name] for name in tensors if name in found}


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over some elements that can be merged with those over other elements.

    Attributes:
        count: the number of finite elements; `low`, `high`, `mean`, `rest` and `m2` are about these.
        low, high: the least and the greatest.
        mean, rest: their mean is the sum of both; `rest` has the digits that do not fit into one float64.
        m2: the sum of the squared deviations from the mean.
        zeros, nan, inf: the numbers of such elements.
    """

    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    mean: float = 0.0
    rest: float = 0.0
    m2: float = 0.0
    zeros: int = 0
    nan: int = 0
    inf: int = 0

    def merged(self, other: Moments) -> Moments:
        """Return the moments of the elements of both.

        The formula does not subtract large sums, so that no digits cancel: T. F. Chan, G. H. Golub, R. J. LeVeque,
        "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", Stanford STAN-CS-79-773, 1979.
        """
        count = self.count + other.count
        share = other.count / count if count else 0.0
        delta = (other.mean - self.mean) + (other.rest - self.rest)
        mean = self.mean + delta * share
        return Moments(
            count,
            min(self.low, other.low),
            max(self.high, other.high),
            mean,
            (self.mean - mean) + delta * share + self.rest,
            self.m2 + other.m2 + delta * self.count * share * delta,
            self.zeros + other.zeros,
            self.nan + other.nan,
            self.inf + other.inf,
        )

    def repeated(self, times: int) -> Moments:
        """Return the moments of the same elements repeated `times` times."""
        if times == 1:
            return self
        return replace(
            self,
            count=self.count * times,
            m2=self.m2 * times,
            zeros=self.zeros * times,
            nan=self.nan * times,
            inf=self.inf * times,
        )

    def statistics(self) -> Statistics:
        """Return the statistics; None for one that is not defined."""
        return {
            "min": self.low if self.count else None,
            "max": self.high if self.count else None,
            "mean": _finite(self.mean + self.rest) if self.count else None,
            "std": _finite(math.sqrt(self.m2 / (self.count - 1))) if self.count > 1 else None,
            "zeros": self.zeros,
            "nan": self.nan,
            "inf": self.inf,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def moments_of(elements: Array, dtype: str) -> Moments:
    """Return the moments of elements, computed in float64."""
    if elements.size == 1 and "complex" not in dtype:
        return _moments_of_one(exact_numbers(elements.reshape(-1), dtype).item())
    flat = elements.reshape(-1)  # a copy if they are not contiguous
    exact = exact_numbers(flat, dtype)
    numbers = exact.astype(np.float64)
    zeros = int(np.count_nonzero(exact == 0))
    nan = inf = 0
    total = float(numbers.sum())
    if not math.isfinite(total):  # the sum shows whether any element is not finite; it may also overflow on finite ones
        nan, inf = int(np.count_nonzero(np.isnan(numbers))), int(np.count_nonzero(np.isinf(numbers)))
        exact = exact[np.isfinite(numbers)]
        numbers = exact.astype(np.float64)
        total = float(numbers.sum())
    count = len(numbers)
    if not count:
        return Moments(zeros=zeros, nan=nan, inf=inf)
    low, high = exact.min().item(), exact.max().item()
    mean = min(max(total / count, float(low)), float(high))
    numbers -= mean
    off = float(numbers.sum())  # the rounding error of the mean
    np.square(numbers, out=numbers)
    m2 = max(float(numbers.sum()) - off / count * off, 0.0)
    return Moments(count, low, high, mean, off / count, m2, zeros, nan, inf)


def _moments_of_one(number: float) -> Moments:
    """Return the moments of a single number without NumPy, because a checkpoint may have 100,000 scales."""
    if not math.isfinite(number):
        return Moments(nan=int(math.isnan(number)), inf=int(math.isinf(number)))
    return Moments(1, number, number, float(number), zeros=int(not number))


def exact_numbers(flat: Array, dtype: str) -> Array:
    """Return the same values in a dtype in which NumPy finds extremes fast; for complex values the absolute values."""
    if dtype == "bool":
        truth: Array = np.minimum(flat.view(np.uint8), 1)
        return truth
    if dtype in INTEGERS or dtype in ("float64", "float32"):
        return flat
    if "complex" in dtype:
        wide = flat.astype(np.complex128)
        absolute: Array = np.hypot(wide.real, wide.imag)  # more exact than np.abs, and so closer to torch
        return absolute
    return flat.astype(np.float32)


# --- NaN and infinities alone ----------------------------------------------------------------------------------------


def count_not_finite(elements: Array, dtype: str) -> Moments:
    """Count the NaN and infinite elements, and none of the other moments. Most tensors have neither."""
    flat = elements.reshape(-1)
    if not _may_be_not_finite(flat, dtype):
        return Moments()
    numbers = exact_numbers(flat, dtype)
    return Moments(nan=int(np.count_nonzero(np.isnan(numbers))), inf=int(np.count_nonzero(np.isinf(numbers))))


def _may_be_not_finite(flat: Array, dtype: str) -> bool:
    if flat.itemsize == 1:
        return bool(_not_finite_patterns(dtype)[bits_of(flat)].any())
    if dtype in ("float16", "bfloat16"):  # without their signs the bits are in the order of the values
        return bool((bits_of(flat) & 0x7FFF).max() >= (0x7C00 if dtype == "float16" else 0x7F80))
    return "complex" in dtype or not np.isfinite(flat).all()


@cache
def _not_finite_patterns(dtype: str) -> Array:
    """Return which of the 256 bit patterns of a one-byte dtype are NaN or infinite."""
    numbers = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)
    found: Array = ~np.isfinite(numbers)
    return found
