"""Count NaN and infinities in quantized and sparse tensors: in the tensors that they consist of, and in the scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from modelcli.checkpoints.byte_comparison import settings_of
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.values import statistics
from modelcli.values.reading import is_readable
from modelcli.values.statistics import Statistics


def not_finite(entries: Mapping[str, CompositeEntry]) -> dict[str, Statistics]:
    """Count the NaNs and infinities in the values or scales of quantized and sparse tensors.

    Tensors without values (on the meta device), and those with a part whose elements cannot be read, are left out.
    """
    readable = {name: entry for name, entry in entries.items() if entry.parts and all(map(_is_known, entry.parts))}
    parts = {
        f"{number} {name}": part
        for name, entry in readable.items()
        for number, part in enumerate(entry.parts)
        if not _is_integer(part)
    }
    found = {name: _among(settings_of(entry)) for name, entry in readable.items()}
    for key, counts in statistics.not_finite(parts).items():
        name = key.partition(" ")[2]
        found[name] = {word: (count or 0) + (counts[word] or 0) for word, count in found[name].items()}
    return found


def _is_known(part: TensorEntry) -> bool:
    return _is_integer(part) or is_readable(part.dtype)


def _is_integer(part: TensorEntry) -> bool:
    """Whether a part consists of integers: indices, or the elements of a quantized tensor."""
    return part.dtype.startswith(("q", "int", "uint", "bool"))


def _among(values: Sequence[object]) -> Statistics:
    """Count the NaNs and infinities among numbers and lists of numbers."""
    lists = (value if isinstance(value, list) else [value] for value in values)
    numbers = [number for numbers in lists for number in numbers if isinstance(number, float)]
    return {"nan": sum(map(math.isnan, numbers)), "inf": sum(map(math.isinf, numbers))}
