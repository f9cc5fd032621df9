"""A storage with the elements of tensors that are joined along an axis, in row-major order.

Row for row of the axes before that one, the bytes of one tensor follow those of the other. They are read when a writer
needs them, about `WINDOW` bytes of the result at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

import numpy as np

from modelcli.checkpoints.storage import FileId, Storage, Windows, gathered, is_in_sequence
from modelcli.values import reading

#: The bytes of the result to make at a time.
WINDOW = 16 * 1024 * 1024
_CHUNK = 8 * 1024 * 1024


class Interleaved:
    """Rows of bytes from several storages, beside one another. It equals itself alone.

    Args:
        parts: the storages, each of which holds its part of every row, one row after another.
        widths: the bytes of one row in each of them, more than zero.
        rows: the number of rows, more than zero.
        start: the first byte of the rows that this storage stands for.
        nbytes: the number of bytes; by default, all from `start`.
    """

    def __init__(
        self,
        parts: tuple[Storage, ...],
        widths: tuple[int, ...],
        rows: int,
        start: int = 0,
        nbytes: int | None = None,
    ) -> None:
        self._parts = parts
        self._widths = widths
        self._rows = rows
        self._start = start
        self.nbytes = sum(widths) * rows - start if nbytes is None else nbytes

    @property
    def in_sequence(self) -> bool:
        return any(map(is_in_sequence, self._parts))

    def files(self) -> Iterable[FileId]:
        return {file for part in self._parts for file in part.files()}

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces of at most 8 MiB. Raises FileFormatError if a file has changed."""
        width, stop = sum(self._widths), self._start + self.nbytes
        first, last = self._start // width, -(-stop // width)
        if width > WINDOW and not self.in_sequence:
            for part in self._segments(first, last):
                for chunk in part.chunks():
                    yield memoryview(chunk)
            return
        skipped, left = self._start - first * width, self.nbytes
        for made in self._bands(first, last):
            wanted = made[skipped : skipped + left]
            for start in range(0, len(wanted), _CHUNK):
                yield wanted[start : start + _CHUNK]
            skipped, left = 0, left - len(wanted)

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """Return the bytes in new memory."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> Interleaved:
        """Return the `nbytes` bytes from `start` as a storage."""
        return Interleaved(self._parts, self._widths, self._rows, self._start + start, nbytes)

    def _segments(self, first: int, last: int) -> Iterator[Storage]:
        """Yield what lies between the first and the last byte of the parts of long rows, one row after another."""
        begin, stop = self._start, self._start + self.nbytes
        at = first * sum(self._widths)
        for row in range(first, last):
            for part, own in zip(self._parts, self._widths, strict=True):
                start, end = max(begin, at), min(stop, at + own)
                if start < end:
                    yield part.part(row * own + start - at, end - start)
                at += own

    def _bands(self, first: int, last: int) -> Iterator[memoryview]:
        """Yield the bytes of the rows from `first` to before `last`, several rows at a time."""
        width = sum(self._widths)
        step = max(1, WINDOW // width)
        pieces = [
            _pieces(part.part(first * own, (last - first) * own), step * own)
            for part, own in zip(self._parts, self._widths, strict=True)
        ]
        ends = list(accumulate(self._widths))
        for start in range(first, last, step):
            rows = min(step, last - start)
            made = np.empty((rows, width), np.uint8)
            for own, end, piece in zip(self._widths, ends, pieces, strict=True):
                made[:, end - own : end] = np.frombuffer(next(piece), np.uint8).reshape(rows, own)
            yield made.reshape(-1).data
            del made  # free the memory before the next rows are made


def _pieces(part: Storage, nbytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a storage, `nbytes` at a time."""
    if is_in_sequence(part):
        yield from reading.in_sequence(part, nbytes)
        return
    for start in range(0, part.nbytes, nbytes):
        yield reading.memory_of(part.part(start, min(nbytes, part.nbytes - start)))
