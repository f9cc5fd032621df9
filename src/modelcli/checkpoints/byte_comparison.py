"""Compare the bytes of tensors in checkpoints piece by piece; two tensors at the same place of a file are not read."""

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
from modelcli.checkpoints.torch_pickle.value_digests import digest_of
from modelcli.errors import FileFormatError
from modelcli.model.dtypes import ITEM_BYTES

#: The bytes of each file in memory at a time.
CHUNK = 1024 * 1024
#: The files that stay open between two tensors: opening a file for each of 100,000 tensors takes longer than reading.
MOST_OPEN = 16

#: Called with the number of bytes of each tensor that were compared since the last call.
Progress = Callable[[int], None]
#: Bytes to compare, in a file or in memory.
_Piece = Span | memoryview


def nbytes_of(entry: TensorEntry | CompositeEntry) -> int:
    """Return the size of the elements of a tensor in bytes; for a composite tensor, of all that is stored."""
    if isinstance(entry, CompositeEntry):
        return entry.stored_bytes
    return prod(entry.shape) * ITEM_BYTES[entry.dtype]


def have_same_order(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors of one shape and dtype store their elements in the same order, without gaps or repeats.

    Only then can their bytes be compared as they are in the files.
    """
    if not prod(one.shape):
        return True
    steps = [
        [stride for size, stride in zip(entry.shape, entry.stride, strict=True) if size > 1] for entry in (one, other)
    ]
    return steps[0] == steps[1] and extent(one.shape, one.stride) == prod(one.shape)


class ByteComparison:
    """Compares the bytes of tensors. The files that it reads stay open until the end of the `with` block."""

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

    def same(self, one: TensorEntry, other: TensorEntry, progress: Progress) -> bool:
        """Whether two tensors that `have_same_order` are equal. Raises FileFormatError if a file has changed."""
        size, count = ITEM_BYTES[one.dtype], prod(one.shape)
        first, second = (entry.storage.part(entry.offset * size, count * size) for entry in (one, other))
        return self._same_storage(first, second, progress)

    def same_parts(self, one: CompositeEntry, other: CompositeEntry, progress: Progress) -> bool:
        """Whether two quantized or sparse tensors consist of equal tensors, scales and settings."""
        if settings_of(one) != settings_of(other) or len(one.parts) != len(other.parts):
            return False
        return all(
            (first.shape, first.dtype) == (second.shape, second.dtype)
            and have_same_order(first, second)
            and self.same(first, second, progress)
            for first, second in zip(one.parts, other.parts, strict=True)
        )

    def _same_storage(self, one: Storage, other: Storage, progress: Progress) -> bool:
        first, second = list(_pieces(one)), list(_pieces(other))
        if len(first) == len(second) and all(map(self._is_same_range, first, second)):
            return True
        for left, right in _in_step(first, second):
            if self._read(left, self._buffers[0]) != self._read(right, self._buffers[1]):
                return False
            progress(left.nbytes)
        return True

    def _is_same_range(self, one: _Piece, other: _Piece) -> bool:
        """Whether two spans are the same bytes of the same file, which may have several names."""
        if not (isinstance(one, Span) and isinstance(other, Span)):
            return False
        if (one.offset, one.nbytes, one.identity) != (other.offset, other.nbytes, other.identity):
            return False
        names = (one.path, other.path)
        if names not in self._one_file:
            self._one_file[names] = names[0] == names[1] or one.path.samefile(other.path)
        return self._one_file[names]

    def _read(self, piece: _Piece, buffer: bytearray) -> bytes | bytearray:
        """Return the bytes of a piece, in `buffer` if they fill it: new memory would make this four times slower."""
        if isinstance(piece, memoryview):
            return bytes(piece)
        file = self._files.get(piece.path) or self._open(piece)
        file.seek(piece.offset)
        data = buffer if piece.nbytes == len(buffer) else bytearray(piece.nbytes)
        left = memoryview(data)
        while left:  # an unbuffered read may return less than asked for
            count = file.readinto(left)
            if not count:
                raise FileFormatError(
                    f"{piece.path} ends early: {len(left):,} bytes are missing",
                    "another program may have shortened it: run the command again",
                )
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
    """Yield the spans of files that make up a storage, in order; other storages as one piece in memory."""
    if isinstance(storage, JoinedSpan):
        for part in storage.parts:
            yield from _pieces(part.part(0, part.nbytes))
    else:
        yield storage if isinstance(storage, Span) else storage.mapped()


def _in_step(one: list[_Piece], other: list[_Piece]) -> Iterator[tuple[_Piece, _Piece]]:
    """Yield pairs of pieces of at most `CHUNK` bytes from two lists that have the same total size."""
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


def settings_of(entry: CompositeEntry) -> list[object]:
    """Return what defines a composite tensor besides the tensors that it consists of.

    For a quantized tensor this is its scheme, and its scale and zero point if they apply to the whole tensor. For a
    tensor of a class of its own it is the digest of its attributes.
    """
    made_by = without_parameter(entry.made_by)
    if not isinstance(made_by, Opaque):
        return []
    if class_of(entry) is not None:
        return [digest_of(made_by.args)]
    if made_by.call.name != "_rebuild_qtensor":
        return []
    return [value for value in made_by.args[4] if not isinstance(value, TensorEntry)]
