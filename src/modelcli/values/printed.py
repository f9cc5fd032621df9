"""Make the values of tensors printable: all of them for a program, a short line of text for a person."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from modelcli.checkpoints.entries import TensorEntry
from modelcli.errors import RequestError
from modelcli.model.tensors import Shape
from modelcli.values.dtypes import Array
from modelcli.values.passes import PRINT_COST, budget_of
from modelcli.values.reading import SMALL, Reader, Readers, at_hand, is_readable, narrowed, nbytes_spanned, view_of

#: Up to this many values are shown in full; of more, the first and last three along each axis.
MAX_IN_FULL = 24
EDGE = 3
#: The most values that are shown of a tensor.
MAX_SHOWN = 1_000
#: The bytes to read at a time from a large tensor, of which only a few elements here and there are needed.
_WINDOW = 1 << 14
#: The kinds of dtypes whose elements NumPy converts to Python numbers itself.
_LISTED = "biufc?"


def collect(
    tensors: Mapping[str, TensorEntry], *, whole: bool, what: str = "the model"
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of tensors by name: as nested lists if `whole` is set, and as a line of text each.

    Dtypes whose elements are not numbers (packed and quantized ones) are left out. Of a large tensor that is contiguous
    in a file, only the values that are shown and their neighbours are read.

    Args:
        tensors: the tensors by name.
        whole: whether all values are needed, not only those in the lines of text.
        what: the name of the model in error messages.

    Raises:
        RequestError: all values of a complex tensor are needed, which JSON cannot hold.
        FileFormatError: views show far more elements than their storages have, or a file has changed.
    """
    lists: dict[str, Any] = {}
    texts: dict[str, str] = {}
    readable = {name: entry for name, entry in tensors.items() if is_readable(entry.dtype)}
    budget = budget_of(tensors.values(), what)
    with Readers(list(readable.values())) as readers:
        for name, entry in readable.items():
            elements = prod(entry.shape)
            budget.spend(PRINT_COST * (elements if whole else min(elements, MAX_SHOWN)), name)
            if "complex" in entry.dtype and whole:
                raise RequestError(f"{name} is complex, and JSON has no complex numbers", "-f table shows them")
            edges = _edges(entry.shape)
            values = readers.own().elements(entry) if whole else _read_edges(readers, entry, edges)
            if whole:
                lists[name] = _listed(values)
                values = _corners(values, edges)
            texts[name] = _nested(values, edges, entry.shape)
    return lists, texts


def _read_edges(readers: Readers, entry: TensorEntry, edges: Sequence[tuple[int, int]]) -> Array:
    """Read the values that are shown: along each axis the first ones, and next to them the last ones."""
    if nbytes_spanned(entry) <= SMALL:
        return _corners(readers.own().elements(entry), edges)
    reader, entry = readers.own(1, window=_WINDOW), at_hand(entry)
    made = np.empty(tuple(map(sum, edges)), view_of(memoryview(b""), narrowed(entry, 0, 0, 0)).dtype)
    runs = [
        [(start, length) for start, length in ((0, first), (size - last, last)) if length]
        for (first, last), size in zip(edges, entry.shape, strict=True)
    ]
    for corner in itertools.product(*runs):
        part, target = entry, []
        for axis, (start, length) in enumerate(corner):
            part = narrowed(part, axis, start, length)
            target.append(slice(0, length) if not start else slice(made.shape[axis] - length, None))
        _fill(made[tuple(target)], reader, part)
    return made


def _fill(made: Array, reader: Reader, part: TensorEntry) -> None:
    """Read elements into `made`, one after another if they are far apart in the file."""
    if nbytes_spanned(part) <= _WINDOW // 2:
        made[...] = reader.elements(part)
        return
    axis = max((axis for axis, size in enumerate(part.shape) if size > 1), key=part.stride.__getitem__)
    for index in range(part.shape[axis]):
        _fill(made[(*[slice(None)] * axis, slice(index, index + 1))], reader, narrowed(part, axis, index, 1))


def _corners(values: Array, edges: Sequence[tuple[int, int]]) -> Array:
    """Return the values that are shown from values in memory, like `_read_edges`."""
    for axis, (first, last) in enumerate(edges):
        size = values.shape[axis]
        if first + last < size:
            before = (slice(None),) * axis
            sides = values[(*before, slice(first))], values[(*before, slice(size - last, None))]
            values = np.concatenate(sides, axis)
    return values


def _edges(shape: Shape) -> list[tuple[int, int]]:
    """Return how many of the first and of the last values along each axis are shown.

    If that would be too many for a table cell, only the first index along the outer axes is shown.
    """
    if prod(shape) <= MAX_IN_FULL:
        return [(size, 0) for size in shape]
    edges = [(EDGE, EDGE) if size > 2 * EDGE else (size, 0) for size in shape]
    for axis in range(len(shape)):
        if prod(map(sum, edges)) <= MAX_SHOWN:
            break
        edges[axis] = (1, 0)
    return edges


def _nested(values: Array, edges: Sequence[tuple[int, int]], shape: Shape) -> str:
    """Return `[[0.1372,-0.0214],[...]]`: four significant digits, without the middle of long axes."""
    if all(first + last == size for (first, last), size in zip(edges, shape, strict=True)):
        return _nested_text(_listed(values))
    (first, last), *inner = edges
    parts = [_nested(part, inner, shape[1:]) for part in values]
    if first + last < shape[0]:
        parts.insert(first, "...")
    return "[" + ",".join(parts) + "]"


def _listed(values: Array) -> Any:
    """Return the values as nested lists of Python numbers."""
    if values.dtype == np.bool_:
        values = values.view(np.uint8) != 0
    return (values if values.dtype.kind in _LISTED else values.astype(np.float32)).tolist()


def _nested_text(value: Any) -> str:
    return "[" + ",".join(map(_nested_text, value)) + "]" if isinstance(value, list) else _number(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | complex) else str(value)
