"""The values of tensors, to be shown: whole for a program, in one short line for a person."""

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
from modelcli.values.passes import SHOWN, budget_of
from modelcli.values.reading import SMALL, Reader, Readers, at_hand, is_readable, narrowed, nbytes_spanned, view_of

#: Up to this many values are shown whole; of more, the first and the last three along each axis.
WHOLE = 24
EDGE = 3
#: More than this many are shown of no tensor.
MOST = 1_000
#: Of a large tensor so many bytes are read at a time: a few elements are wanted here and there.
_WINDOW = 1 << 14
#: The dtypes whose elements NumPy gives as Python's numbers by itself.
_LISTED = "biufc?"


def collect(
    tensors: Mapping[str, TensorEntry], *, whole: bool, what: str = "the model"
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of tensors by their names: as nested lists where `whole`, and as one line each.

    Left out are dtypes whose elements are no numbers (packed and quantized ones). Of a large tensor in one piece of a
    file, only what is shown and its neighbours are read.

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
    readable = {name: entry for name, entry in tensors.items() if is_readable(entry.dtype)}
    budget = budget_of(tensors.values(), what)
    with Readers(list(readable.values())) as readers:
        for name, entry in readable.items():
            elements = prod(entry.shape)
            budget.spend(SHOWN * (elements if whole else min(elements, MOST)), name)
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
    """The values that are shown, along each axis the first and the last ones side by side."""
    if nbytes_spanned(entry) <= SMALL:
        return _corners(readers.own().elements(entry), edges)
    reader, entry = readers.own(1, window=_WINDOW), at_hand(entry)
    made = np.empty(tuple(map(sum, edges)), view_of(memoryview(b""), narrowed(entry, 0, 0, 0)).dtype)
    runs = [
        [(start, length) for start, length in ((0, first), (size - last, last)) if length]
        for (first, last), size in zip(edges, entry.shape, strict=True)
    ]
    for corner in itertools.product(*runs):
        part, place = entry, []
        for axis, (start, length) in enumerate(corner):
            part = narrowed(part, axis, start, length)
            place.append(slice(0, length) if not start else slice(made.shape[axis] - length, None))
        _fill(made[tuple(place)], reader, part)
    return made


def _fill(made: Array, reader: Reader, part: TensorEntry) -> None:
    """Read elements one after another where they lie far apart."""
    if nbytes_spanned(part) <= _WINDOW // 2:
        made[...] = reader.elements(part)
        return
    axis = max((axis for axis, size in enumerate(part.shape) if size > 1), key=part.stride.__getitem__)
    for index in range(part.shape[axis]):
        _fill(made[(*[slice(None)] * axis, slice(index, index + 1))], reader, narrowed(part, axis, index, 1))


def _corners(values: Array, edges: Sequence[tuple[int, int]]) -> Array:
    """The same of values in memory."""
    for axis, (first, last) in enumerate(edges):
        size = values.shape[axis]
        if first + last < size:
            before = (slice(None),) * axis
            sides = values[(*before, slice(first))], values[(*before, slice(size - last, None))]
            values = np.concatenate(sides, axis)
    return values


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


def _nested(values: Array, edges: Sequence[tuple[int, int]], shape: Shape) -> str:
    """`[[0.1372,-0.0214],[...]]`: four significant digits, the middle of long axes left out."""
    if all(first + last == size for (first, last), size in zip(edges, shape, strict=True)):
        return _whole(_listed(values))
    (first, last), *inner = edges
    parts = [_nested(part, inner, shape[1:]) for part in values]
    if first + last < shape[0]:
        parts.insert(first, "...")
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
