"""A storage with the elements of a tensor in row-major order, as a contiguous copy of the tensor has them.

The bytes are read when a writer needs them, at most `WINDOW` bytes of a large storage at a time.
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

#: The bytes of a storage to read, and the bytes of the result to make, at a time: more would take more memory, and less
#: would read the same bytes more often.
WINDOW = 24 * 1024 * 1024
_CHUNK = 8 * 1024 * 1024
#: NumPy's dtypes for copying elements of any meaning, by size.
_MOVED = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


def row_major(entry: TensorEntry) -> Storage:
    """Return the elements of a tensor in row-major order as a storage."""
    size = ITEM_BYTES[entry.dtype]
    if shapes.is_row_major(entry.shape, entry.stride):
        return entry.storage.part(entry.offset * size, prod(entry.shape) * size)
    return RowMajor(entry, 0, prod(entry.shape) * size)


@dataclass(frozen=True, slots=True)
class RowMajor:
    """The elements of a tensor in row-major order: `nbytes` bytes from `start`, both multiples of the element size."""

    entry: TensorEntry
    start: int
    nbytes: int

    def files(self) -> Iterable[FileId]:
        return self.entry.storage.files()

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces of at most 8 MiB."""
        for start in range(0, self.nbytes, WINDOW):
            made = self._made(self.start + start, min(WINDOW, self.nbytes - start))
            for first in range(0, len(made), _CHUNK):
                yield made[first : first + _CHUNK]
            del made  # free the memory before the next bytes are made

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """Return the bytes in new memory."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> RowMajor:
        """Return the `nbytes` bytes from `start`, both multiples of the element size, as a storage."""
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
    """Return views that contain the elements `start` to `stop` in row-major order: complete rows as far as possible."""
    if (start, stop) == (0, prod(entry.shape)):
        return [entry]
    row = prod(entry.shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # both are in one row
        return _run(_row(entry, last), start - last * row, stop - last * row)
    head = _run(_row(entry, first - 1), start - (first - 1) * row, row) if start < first * row else []
    tail = _run(_row(entry, last), 0, stop - last * row) if last * row < stop else []
    middle = [reading.narrowed(entry, 0, first, last - first)] if first < last else []
    return [*head, *middle, *tail]


def _row(entry: TensorEntry, index: int) -> TensorEntry:
    offset = entry.offset + index * entry.stride[0]
    return replace(entry, shape=entry.shape[1:], stride=entry.stride[1:], offset=offset)


def _copy(target: Array, entry: TensorEntry) -> None:
    """Copy the elements of a tensor; if they are too far apart in its storage, one half after the other."""
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
    _copy(target[(*whole, slice(middle))], reading.narrowed(entry, axis, 0, middle))
    _copy(target[(*whole, slice(middle, None))], reading.narrowed(entry, axis, middle, entry.shape[axis] - middle))
