"""The elements of a tensor one after another, as a contiguous copy of it has them: a source that a writer takes.

Nothing is read before the bytes are asked for, and of a large storage no more than `WINDOW` bytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from modelcli.checkpoints import shapes
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.shapes import extent
from modelcli.checkpoints.storage import FileId, Storage, Windows, gathered
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.values import reading
from modelcli.values.dtypes import Array

#: So many bytes of a storage are read at a time where elements that lie far apart in it are brought together, and so
#: many are made at a time: more takes more memory, less reads the same bytes more often.
WINDOW = 24 * 1024 * 1024
_CHUNK = 8 * 1024 * 1024
#: NumPy's types for elements that are moved, whatever they mean, by their size.
_MOVED = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


def row_major(entry: TensorEntry) -> Storage:
    """The elements of a tensor in row-major order."""
    size = ITEM_BYTES[entry.dtype]
    if shapes.is_row_major(entry.shape, entry.stride):
        return entry.storage.part(entry.offset * size, prod(entry.shape) * size)
    return RowMajor(entry, 0, prod(entry.shape) * size)


@dataclass(frozen=True, slots=True)
class RowMajor:
    """The `nbytes` from `start` of the elements of a tensor in row-major order; both on the border of an element."""

    entry: TensorEntry
    start: int
    nbytes: int

    def files(self) -> Iterable[FileId]:
        return self.entry.storage.files()

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, in pieces of at most 8 MiB."""
        for start in range(0, self.nbytes, WINDOW):
            made = self._made(self.start + start, min(WINDOW, self.nbytes - start))
            for first in range(0, len(made), _CHUNK):
                yield made[first : first + _CHUNK]
            del made  # before the next ones are made

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """The bytes in memory of their own."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> RowMajor:
        """`nbytes` of the bytes, from `start`, both on the border of an element."""
        return replace(self, start=self.start + start, nbytes=nbytes)

    def _made(self, start: int, nbytes: int) -> memoryview:
        size = ITEM_BYTES[self.entry.dtype]
        made, done = np.empty(nbytes // size, _MOVED[size]), 0
        for part in _run(self.entry, start // size, (start + nbytes) // size):
            count = prod(part.shape)
            _copy(made[done : done + count].reshape(part.shape), part)
            done += count
        return made.view(np.uint8).data


def _run(entry: TensorEntry, start: int, stop: int) -> list[TensorEntry]:
    """The elements of a tensor from one to another in row-major order, as views of it: whole rows as far as can be."""
    if (start, stop) == (0, prod(entry.shape)):
        return [entry]
    row = prod(entry.shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # both lie in one row
        return _run(_row(entry, last), start - last * row, stop - last * row)
    head = _run(_row(entry, first - 1), start - (first - 1) * row, row) if start < first * row else []
    tail = _run(_row(entry, last), 0, stop - last * row) if last * row < stop else []
    middle = [_narrowed(entry, 0, first, last - first)] if first < last else []
    return [*head, *middle, *tail]


def _row(entry: TensorEntry, index: int) -> TensorEntry:
    offset = entry.offset + index * entry.stride[0]
    return replace(entry, shape=entry.shape[1:], stride=entry.stride[1:], offset=offset)


def _narrowed(entry: TensorEntry, axis: int, start: int, length: int) -> TensorEntry:
    shape = (*entry.shape[:axis], length, *entry.shape[axis + 1 :])
    return replace(entry, shape=shape, offset=entry.offset + start * entry.stride[axis])


def _copy(target: Array, entry: TensorEntry) -> None:
    """Copy the elements of a tensor; what lies far apart in its storage in halves."""
    size = ITEM_BYTES[entry.dtype]
    nbytes = extent(entry.shape, entry.stride) * size
    if nbytes <= WINDOW or prod(entry.shape) == 1:
        data = reading.memory_of(entry.storage.part(entry.offset * size, nbytes))
        flat = reading.array_of(data, np.dtype(_MOVED[size]))
        strides = [step * size for step in entry.stride]
        target[...] = np.lib.stride_tricks.as_strided(flat, entry.shape, strides, writeable=False)
        return
    reach = [((length - 1) * step, length) for length, step in zip(entry.shape, entry.stride, strict=True)]
    axis = reach.index(max(reach))
    middle = entry.shape[axis] // 2
    whole = (slice(None),) * axis
    _copy(target[(*whole, slice(middle))], _narrowed(entry, axis, 0, middle))
    _copy(target[(*whole, slice(middle, None))], _narrowed(entry, axis, middle, entry.shape[axis] - middle))
