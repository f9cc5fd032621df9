"""NaN and infinities in quantized and sparse tensors: in the parts that they are made of, and in their scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from modelcli.checkpoints.byte_comparison import numbers_of
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.values import statistics
from modelcli.values.reading import is_readable
from modelcli.values.statistics import Statistics


def not_finite(entries: Mapping[str, CompositeEntry]) -> dict[str, Statistics]:
    """How many NaNs and infinities quantized and sparse tensors are made of: those of their values, or of their scales.

    Left out are those that have no parts (on the meta device), or a part whose elements are no numbers.
    """
    looked_at = {name: entry for name, entry in entries.items() if entry.parts and all(map(_is_known, entry.parts))}
    parts = {
        f"{number} {name}": part
        for name, entry in looked_at.items()
        for number, part in enumerate(entry.parts)
        if not _is_whole(part)
    }
    found = {name: _among(numbers_of(entry)) for name, entry in looked_at.items()}
    for key, counts in statistics.not_finite(parts).items():
        name = key.partition(" ")[2]
        found[name] = {word: (count or 0) + (counts[word] or 0) for word, count in found[name].items()}
    return found


def _is_known(part: TensorEntry) -> bool:
    return _is_whole(part) or is_readable(part.dtype)


def _is_whole(part: TensorEntry) -> bool:
    """Whether a part has integers: indices, or the elements of a quantized tensor."""
    return part.dtype.startswith(("q", "int", "uint", "bool"))


def _among(values: Sequence[object]) -> Statistics:
    """How many NaNs and infinities are among numbers, some of which are in lists."""
    several = (value if isinstance(value, list) else [value] for value in values)
    numbers = [number for numbers in several for number in numbers if isinstance(number, float)]
    return {"nan": sum(map(math.isnan, numbers)), "inf": sum(map(math.isinf, numbers))}
