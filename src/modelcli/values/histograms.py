"""Count the values of tensors in bins, in one pass over their bytes after the one that found their ranges."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from modelcli.checkpoints.entries import TensorEntry
from modelcli.values.dtypes import Array
from modelcli.values.passes import each_piece
from modelcli.values.reading import nbytes_shown, without_repeats
from modelcli.values.statistics import Progress, Statistics, exact_numbers, silent

#: The number of bins of a histogram.
BINS = 32


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many finite elements of a tensor lie in each of equally wide bins.

    Attributes:
        low, high: the first edge of the first bin and the last edge of the last one, which includes that edge.
        counts: the number of elements in each bin. There is a single bin if float64 has no `BINS` + 1 different edges
            between `low` and `high`.
    """

    low: float
    high: float
    counts: tuple[int, ...]


def collect(
    tensors: Mapping[str, TensorEntry],
    statistics: Mapping[str, Statistics],
    progress: Progress = silent,
    what: str = "the model",
) -> dict[str, Histogram]:
    """Return the histogram of the finite elements of each tensor, by name.

    It is the one that `numpy.histogram(finite, bins=BINS)` computes from all finite elements at once as float64, or for
    complex values from the absolute values. A tensor without a finite element has no histogram.

    Args:
        tensors: the tensors by name.
        statistics: what `statistics.collect` found for them; tensors that are not in it are left out.
        progress: called with the number of bytes done, and the total.
        what: the name of the model in error messages.

    Raises:
        FileFormatError: views show far more elements than their storages have, or a file has changed.
    """
    names: dict[object, list[str]] = defaultdict(list)
    for name, entry in tensors.items():
        if statistics.get(name, {}).get("min") is not None:
            names[entry.view or name].append(name)
    once = {first: without_repeats(tensors[first]) for first, *_ in names.values()}
    edges = {first: edges_of(*_range_of(statistics[first])) for first in once}
    total = sum(nbytes_shown(entry) for entry, _ in once.values())
    progress(0, total)
    done = 0
    counted: dict[str, Array] = {}
    views = {first: (entry,) for first, (entry, _) in once.items()}
    for name, nbytes, counts in each_piece(views, _counts, what, edges):
        counted[name] = counted[name] + counts if name in counted else counts
        done += nbytes
        progress(done, total)
    found: dict[str, Histogram] = {}
    for first, *others in names.values():
        counts_of_all = tuple(int(count) * once[first][1] for count in counted[first])
        histogram = Histogram(edges[first].low, edges[first].high, counts_of_all)
        found |= dict.fromkeys((first, *others), histogram)
    return {name: found[name] for name in tensors if name in found}


def _range_of(found: Statistics) -> tuple[float, float]:
    low, high = found["min"], found["max"]
    assert low is not None
    assert high is not None
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Edges:
    """The range of a histogram, and the number of its bins."""

    low: float
    high: float
    bins: int


def edges_of(low: float, high: float) -> Edges:
    """Return the edges for finite values from `low` to `high`: those of `numpy.histogram`, or those of one bin.

    As in NumPy, a range without a width is widened by 0.5 on both sides.
    """
    if low == high:
        low, high = low - 0.5, high + 0.5
    with np.errstate(all="ignore"):
        edges = np.linspace(low, high, BINS + 1)
    whole = bool(np.isfinite(edges).all() and (np.diff(edges) > 0).all()) and math.isfinite(high - low)
    return Edges(low, high, BINS if whole else 1)


def _counts(elements: Array, dtype: str, edges: Edges) -> Array:
    """Return the number of finite elements in each bin."""
    numbers = exact_numbers(elements.reshape(-1), dtype).astype(np.float64)
    if not math.isfinite(float(numbers.sum())):
        numbers = numbers[np.isfinite(numbers)]
    if edges.bins == 1:
        return np.array([len(numbers)])
    counts, _ = np.histogram(numbers, edges.bins, (edges.low, edges.high))
    return counts
