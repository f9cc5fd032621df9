"""Whether tensors of checkpoints have the same bytes: compared in pieces, and not read where both are one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.shapes import extent
from modelcli.checkpoints.storage import JoinedSpan, Span, Storage, identity_of
from modelcli.checkpoints.torch_pickle.composite_tensors import class_of, without_parameter
from modelcli.checkpoints.torch_pickle.inert_values import Opaque
from modelcli.checkpoints.torch_pickle.value_digests import form_of
from modelcli.errors import FileFormatError
from modelcli.model.dtypes import ITEM_BYTES

#: Bytes of either file that are held at a time.
CHUNK = 1024 * 1024
#: Files that stay open between two tensors: to open one anew for each of 100,000 takes longer than to read them.
MOST_OPEN = 16

#: Told how many bytes have been read of each of two tensors since it was told last.
Told = Callable[[int], None]
#: Bytes that are compared: of a file, or in memory.
_Piece = Span | memoryview


def nbytes_of(entry: TensorEntry | CompositeEntry) -> int:
    """The bytes of what a tensor shows."""
    if isinstance(entry, CompositeEntry):
        return entry.stored_bytes
    return prod(entry.shape) * ITEM_BYTES[entry.dtype]


def lie_alike(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors of one shape and dtype hold their elements in the same order, without holes or repeats.

    Only then their bytes can be compared as they lie in the files.
    """
    if not prod(one.shape):
        return True
    steps = [
        [stride for size, stride in zip(entry.shape, entry.stride, strict=True) if size > 1] for entry in (one, other)
    ]
    return steps[0] == steps[1] and extent(one.shape, one.stride) == prod(one.shape)


class ByteComparison:
    """Compares bytes of checkpoints. The files it reads stay open until it is closed."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._buffers = bytearray(CHUNK), bytearray(CHUNK)
        self._files: dict[Path, FileIO] = {}
        self._one_file: dict[tuple[Path, Path], bool] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def same(self, one: TensorEntry, other: TensorEntry, told: Told) -> bool:
        """Whether two tensors that `lie_alike` have the same bytes. Raises FileFormatError where a file has changed."""
        size, count = ITEM_BYTES[one.dtype], prod(one.shape)
        first, second = (entry.storage.part(entry.offset * size, count * size) for entry in (one, other))
        return self._same_storage(first, second, told)

    def same_parts(self, one: CompositeEntry, other: CompositeEntry, told: Told) -> bool:
        """Whether two quantized or sparse tensors are made of the same parts and numbers."""
        if numbers_of(one) != numbers_of(other) or len(one.parts) != len(other.parts):
            return False
        return all(
            (first.shape, first.dtype) == (second.shape, second.dtype)
            and lie_alike(first, second)
            and self.same(first, second, told)
            for first, second in zip(one.parts, other.parts, strict=True)
        )

    def _same_storage(self, one: Storage, other: Storage, told: Told) -> bool:
        first, second = list(_pieces(one)), list(_pieces(other))
        if len(first) == len(second) and all(map(self._is_one_place, first, second)):
            return True
        for left, right in _in_step(first, second):
            if self._read(left, self._buffers[0]) != self._read(right, self._buffers[1]):
                return False
            told(left.nbytes)
        return True

    def _is_one_place(self, one: _Piece, other: _Piece) -> bool:
        """Whether two spans are the same bytes on the disk: of one file, whatever its names are."""
        if not (isinstance(one, Span) and isinstance(other, Span)):
            return False
        if (one.offset, one.nbytes, one.identity) != (other.offset, other.nbytes, other.identity):
            return False
        names = (one.path, other.path)
        if names not in self._one_file:
            self._one_file[names] = names[0] == names[1] or one.path.samefile(other.path)
        return self._one_file[names]

    def _read(self, piece: _Piece, buffer: bytearray) -> bytes | bytearray:
        """The bytes of a piece, in `buffer` where they fill it: with memory taken anew it is four times slower."""
        if isinstance(piece, memoryview):
            return bytes(piece)
        file = self._files.get(piece.path) or self._open(piece)
        file.seek(piece.offset)
        data = buffer if piece.nbytes == len(buffer) else bytearray(piece.nbytes)
        left = memoryview(data)
        while left:  # an unbuffered read may give less than there is
            count = file.readinto(left)
            if not count:
                raise FileFormatError(f"{piece.path} ends early: {len(left)} bytes are missing")
            left = left[count:]
        return data

    def _open(self, span: Span) -> FileIO:
        if len(self._files) == MOST_OPEN:
            self._close()
        file = self._stack.enter_context(FileIO(span.path))
        if identity_of(span.path) != span.identity:
            raise FileFormatError(f"{span.path} changed while it was being read", "run the command again")
        self._files[span.path] = file
        return file

    def _close(self) -> None:
        self._stack.close()
        self._files.clear()


def _pieces(storage: Storage) -> Iterator[_Piece]:
    """The spans of files that a storage is made of, in order; what no span holds in this order is held in memory."""
    if isinstance(storage, JoinedSpan):
        for part in storage.parts:
            yield from _pieces(part.part(0, part.nbytes))
    else:
        yield storage if isinstance(storage, Span) else storage.mapped()


def _in_step(one: list[_Piece], other: list[_Piece]) -> Iterator[tuple[_Piece, _Piece]]:
    """Two lists of as many bytes in all, cut at the same places into pieces of at most `CHUNK` bytes."""
    lists = (iter(one), iter(other))
    left, right = (next(pieces, None) for pieces in lists)
    while left is not None and right is not None:
        length = min(left.nbytes, right.nbytes, CHUNK)
        if length:
            yield _cut(left, 0, length), _cut(right, 0, length)
        left, right = _cut(left, length), _cut(right, length)
        left = left if left.nbytes else next(lists[0], None)
        right = right if right.nbytes else next(lists[1], None)


def _cut(piece: _Piece, start: int, length: int | None = None) -> _Piece:
    length = piece.nbytes - start if length is None else length
    return piece.part(start, length) if isinstance(piece, Span) else piece[start : start + length]


def numbers_of(entry: CompositeEntry) -> list[object]:
    """What a tensor has besides its parts: of a quantized one its scheme, and a scale and a zero point for all of it.

    Of one of a class of its own it is the form of its attributes: all that they say, less the tensors in them.
    """
    made_by = without_parameter(entry.made_by)
    if not isinstance(made_by, Opaque):
        return []
    if class_of(entry) is not None:
        return [form_of(made_by.args)]
    if made_by.call.name != "_rebuild_qtensor":
        return []
    return [value for value in made_by.args[4] if not isinstance(value, TensorEntry)]
