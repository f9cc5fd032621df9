"""The values of tensors, to be shown: whole for a program, in one short line for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.storage import ReadAhead
from modelcli.errors import RequestError
from modelcli.model.tensors import Shape
from modelcli.values.dtypes import Array
from modelcli.values.passes import SHOWN, budget_of
from modelcli.values.reading import is_readable, part_of, view_of

#: Up to this many values are shown whole; of more, the first and the last three along each axis.
WHOLE = 24
EDGE = 3
#: More than this many are shown of no tensor.
MOST = 1_000
#: The dtypes whose elements NumPy gives as Python's numbers by itself.
_LISTED = "biufc?"


def collect(
    tensors: Mapping[str, TensorEntry], *, whole: bool, what: str = "the model"
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of tensors by their names: as nested lists where `whole`, and as one line each.

    Left out are dtypes whose elements are no numbers (packed and quantized ones). Of a large tensor in one piece of a
    file, only the pages of what is shown are read.

    Args:
        tensors: Views into storages of any kind.
        whole: Whether all values are wanted, and not only those that a line shows.
        what: What the model is called in a refusal.

    Raises:
        RequestError: For the list of a complex tensor, which JSON cannot hold.
        FileFormatError: Where views show far more elements than their storages have, and where a file has changed.
    """
    lists: dict[str, Any] = {}
    texts: dict[str, str] = {}
    budget, windows = budget_of(tensors.values(), what), ReadAhead(in_part=not whole)
    for name, entry in tensors.items():
        if not is_readable(entry.dtype):
            continue
        elements = prod(entry.shape)
        budget.spend(SHOWN * (elements if whole else min(elements, MOST)), name)
        values = view_of(part_of(entry).mapped(windows), entry)
        if values.dtype.kind == "c" and whole:
            raise RequestError(f"{name} is complex, and JSON has no complex numbers", "-f table shows them")
        if whole:
            lists[name] = _listed(values)
        texts[name] = text_of(values)
    return lists, texts


def text_of(values: Array) -> str:
    """`[[0.1372,-0.0214],[...]]`: four significant digits, the middle of long axes left out."""
    return _nested(values, _edges(values.shape))


def _edges(shape: Shape) -> list[tuple[int, int]]:
    """How many of the first and of the last along each axis are shown.

    Of the outermost axes only the first, where that would be more values than a cell can be read with.
    """
    if prod(shape) <= WHOLE:
        return [(size, 0) for size in shape]
    edges = [(EDGE, EDGE) if size > 2 * EDGE else (size, 0) for size in shape]
    for axis in range(len(shape)):
        if prod(map(sum, edges)) <= MOST:
            break
        edges[axis] = (1, 0)
    return edges


def _nested(values: Array, edges: Sequence[tuple[int, int]]) -> str:
    if all(first + last == size for (first, last), size in zip(edges, values.shape, strict=True)):
        return _whole(_listed(values))
    (first, last), *inner = edges
    size = len(values)
    parts = [_nested(values[index], inner) for index in range(first)]
    if first + last < size:
        parts.append("...")
    parts += [_nested(values[index], inner) for index in range(size - last, size)]
    return "[" + ",".join(parts) + "]"


def _listed(values: Array) -> Any:
    """The values as Python's numbers, in lists."""
    if values.dtype == np.bool_:
        values = values.view(np.uint8) != 0
    return (values if values.dtype.kind in _LISTED else values.astype(np.float32)).tolist()


def _whole(value: Any) -> str:
    return "[" + ",".join(map(_whole, value)) + "]" if isinstance(value, list) else _number(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | complex) else str(value)
