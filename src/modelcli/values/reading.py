"""Read elements of tensors in files as NumPy arrays, in pieces of bounded size, without mapping the files.

If a mapped file is shortened, the process is killed, whereas reading it returns an error. Reading large pieces into
reused memory is also faster than page faults.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from types import TracebackType
from typing import Any, Self

import numpy as np

from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.shapes import extent
from modelcli.checkpoints.storage import FileId, Span, Storage, Windows, gathered, is_in_sequence, require_unchanged
from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Shape
from modelcli.values.dtypes import Array, is_held, numpy_dtype

#: NumPy does not have these complex dtypes; they are read as pairs of the dtype of their parts.
_HALVES = {"complex32": "float16", "bcomplex32": "bfloat16"}
#: The most elements of a piece, including gaps between them: 2 MiB as float64, which fit into the processor's cache.
PIECE = 1 << 18
#: For a span of at most `SMALL` bytes, `WINDOW` bytes of its file are read at a time.
SMALL, WINDOW = 1 << 16, 1 << 20


# --- pieces of a tensor ----------------------------------------------------------------------------------------------


def without_repeats(entry: TensorEntry) -> tuple[TensorEntry, int]:
    """Return a view of an expanded tensor that has each element once, and how many times the tensor repeats it."""
    repeated = [size > 1 and not step for size, step in zip(entry.shape, entry.stride, strict=True)]
    if not any(repeated):
        return entry, 1
    shape = tuple(1 if again else size for size, again in zip(entry.shape, repeated, strict=True))
    return replace(entry, shape=shape), prod(entry.shape) // max(prod(shape), 1)


def pieces_of(*entries: TensorEntry) -> Iterator[tuple[TensorEntry, ...]]:
    """Yield pieces of tensors that cover each element once. A piece has and spans at most `PIECE` elements.

    For several tensors of one shape, each piece is the same part of all of them. The cut is along the axis with the
    longest stride of the widest tensor, so that elements near one another in the storage stay together.
    """
    pending: list[Iterator[tuple[TensorEntry, ...]]] = [iter((entries,))]
    while pending:
        part = next(pending[-1], None)
        if part is None:
            pending.pop()
            continue
        shape = part[0].shape
        elements, spans = prod(shape), [extent(shape, entry.stride) for entry in part]
        if max(elements, *spans) > PIECE:
            pending.append(_cut(part, part[spans.index(max(spans))].stride))
        elif elements:
            yield part


def _cut(entries: tuple[TensorEntry, ...], stride: Shape) -> Iterator[tuple[TensorEntry, ...]]:
    """Return the parts of tensors along the axis with the longest stride, in order."""
    shape = entries[0].shape
    axis = max((axis for axis, size in enumerate(shape) if size > 1), key=stride.__getitem__)
    # Cut at least in half: with overlapping strides, a short range of storage can have any number of elements.
    step = max(1, min(PIECE // max(stride[axis], 1), (shape[axis] + 1) // 2))
    for start in range(0, shape[axis], step):
        length = min(step, shape[axis] - start)
        yield tuple([narrowed(entry, axis, start, length) for entry in entries])


def narrowed(entry: TensorEntry, axis: int, start: int, length: int) -> TensorEntry:
    """Return a part of a tensor along one axis, as `tensor.narrow(axis, start, length)` does."""
    shape = (*entry.shape[:axis], length, *entry.shape[axis + 1 :])
    offset = entry.offset + start * entry.stride[axis]
    # `replace` takes five times as long, and a tensor can have thousands of parts.
    return TensorEntry(shape, entry.dtype, entry.stride, offset, entry.storage, entry.requires_grad, entry.is_parameter)


def is_readable(dtype: str) -> bool:
    """Whether this module can read the elements of a dtype as numbers."""
    return is_held(dtype) or dtype in _HALVES


def nbytes_shown(entry: TensorEntry) -> int:
    """Return the size in bytes of all elements of a view, repeated elements counted each time."""
    return prod(entry.shape) * ITEM_BYTES[entry.dtype]


def nbytes_spanned(entry: TensorEntry) -> int:
    """Return the bytes of the storage from the first element of a view to the last."""
    return extent(entry.shape, entry.stride) * ITEM_BYTES[entry.dtype]


# --- bytes -----------------------------------------------------------------------------------------------------------


def memory_of(storage: Storage) -> memoryview:
    """Return the bytes of a storage in new memory."""
    if not isinstance(storage, Span):
        return storage.mapped()
    memory = np.empty(storage.nbytes, np.uint8).data
    storage.read_into(memory)
    return memory


def in_sequence(storage: Storage, nbytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a storage from the first to the last, `nbytes` at a time."""
    held = bytearray()
    for chunk in storage.chunks():
        held += chunk
        whole = len(held) - len(held) % nbytes
        for start in range(0, whole, nbytes):
            yield memoryview(held[start : start + nbytes])  # a copy
        del held[:whole]
    if held:
        yield memoryview(held)


@dataclass(frozen=True, eq=False, slots=True)
class Gathered:
    """A storage whose bytes have been copied into memory."""

    data: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def files(self) -> Iterable[FileId]:
        return ()

    def chunks(self) -> Iterator[memoryview]:
        yield self.data

    def bytes(self) -> bytes:
        return bytes(self.data)

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """Return the memory itself, which must not be changed."""
        return self.data

    def part(self, start: int, nbytes: int) -> Gathered:
        return Gathered(self.data[start : start + nbytes])


def at_hand(entry: TensorEntry) -> TensorEntry:
    """Return a tensor whose parts can be read separately: copied into memory if it can only be read in sequence."""
    if not is_in_sequence(entry.storage) or extent(entry.shape, entry.stride) <= PIECE:
        return entry
    return replace(entry, offset=0, storage=Gathered(gathered(part_of(entry))))


def array_of(data: memoryview, dtype: np.dtype[Any]) -> Array:
    """Return memory as an array of elements."""
    return np.frombuffer(data, dtype) if len(data) else np.empty(0, dtype)


def view_of(data: memoryview, entry: TensorEntry) -> Array:
    """Return the elements of a tensor. `data` has the bytes from its first element to its last."""
    if entry.dtype in _HALVES:
        pairs = array_of(data, numpy_dtype(_HALVES[entry.dtype]))
        flat = pairs.astype(np.float32).view(np.complex64)
    else:
        flat = array_of(data, numpy_dtype(entry.dtype))
    if not prod(entry.shape):
        return flat[:0].reshape(entry.shape)
    strides = [step * flat.itemsize if size > 1 else 0 for size, step in zip(entry.shape, entry.stride, strict=True)]
    return np.ndarray(entry.shape, flat.dtype, flat, 0, strides)


def part_of(entry: TensorEntry) -> Storage:
    """Return the part of a tensor's storage from its first element to its last."""
    size = ITEM_BYTES[entry.dtype]
    return entry.storage.part(entry.offset * size, extent(entry.shape, entry.stride) * size)


class Reader:
    """Reads storages one after another for one thread. It keeps the last file open and reuses its memory."""

    def __init__(self, window: int = WINDOW) -> None:
        """Make a reader. For a small span, it reads `window` bytes of the file."""
        self._ahead = window
        self._file: FileIO | None = None
        self._open: FileId | None = None
        self._memory = np.empty(0, np.uint8)
        self._window = np.empty(0, np.uint8)
        self._held: tuple[FileId, int, int] | None = None  # the file, the first byte, and how many of `_window`

    def elements(self, entry: TensorEntry) -> Array:
        """Return the elements of a tensor that spans at most a piece. They are valid until the next call."""
        return view_of(self.bytes(part_of(entry)), entry)

    def bytes(self, storage: Storage) -> memoryview:
        """Return the bytes of a storage. They are valid until the next call."""
        if not isinstance(storage, Span):
            return storage.mapped()
        if storage.nbytes <= min(SMALL, self._ahead):
            return self._from_window(storage)
        if len(self._memory) < storage.nbytes:
            self._memory = np.empty(storage.nbytes, np.uint8)
        found = self._memory.data[: storage.nbytes]
        self._read(storage, found)
        return found

    def _from_window(self, span: Span) -> memoryview:
        file = (span.path, span.identity)
        if self._held is not None:
            held, first, length = self._held
            start = span.offset - first
            if held == file and 0 <= start <= length - span.nbytes:
                return self._window.data[start : start + span.nbytes]
        first = (
            span.offset - span.offset % mmap.PAGESIZE
        )  # so that elements have the same alignment in memory as in the file
        length = max(min(self._ahead, span.identity[0] - first), span.offset + span.nbytes - first)
        if len(self._window) < length:
            self._window = np.empty(length, np.uint8)
        self._held = None
        self._read(Span(span.path, first, length, span.identity), self._window.data[:length])
        self._held = (file, first, length)
        start = span.offset - first
        return self._window.data[start : start + span.nbytes]

    def _read(self, span: Span, memory: memoryview) -> None:
        """Read a span into memory. Raises FileFormatError if its file has changed or is too short."""
        file = self._opened(span)
        try:
            file.seek(span.offset)
            left = memory
            while left:
                count = file.readinto(left)
                if not count:
                    raise FileFormatError(
                        f"{span.path} ends early: {len(left):,} bytes are missing",
                        "another program may have shortened it: run the command again",
                    )
                left = left[count:]
        except OSError as error:
            raise SystemFailureError(f"cannot read {span.path}: {error.strerror or error}") from None

    def _opened(self, span: Span) -> FileIO:
        if self._file is not None and self._open == (span.path, span.identity):
            return self._file
        self.close()
        require_unchanged(span.path, span.identity)
        try:
            self._file = FileIO(span.path)
        except OSError as error:
            raise SystemFailureError(f"cannot read {span.path}: {error.strerror or error}") from None
        require_unchanged(span.path, span.identity, self._file.fileno())
        self._open = (span.path, span.identity)
        return self._file

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = self._open = None


class Readers:
    """Readers for each thread. The end of the `with` block checks that the files have not changed."""

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        """Make readers for the tensors `entries`, which must be all that will be read."""
        self._all: list[Reader] = []
        self._own = threading.local()
        storages = {id(entry.storage): entry.storage for entry in entries}
        self._files: set[FileId] = {file for storage in storages.values() for file in storage.files()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reader in self._all:
            reader.close()
        if error is None:
            for path, identity in sorted(self._files):
                require_unchanged(path, identity)

    def own(self, number: int = 0, *, window: int = WINDOW) -> Reader:
        """Return a reader of the calling thread. Readers with different numbers have separate memory."""
        own: dict[Any, Reader] = self._own.__dict__
        if number not in own:
            own[number] = Reader(window)
            self._all.append(own[number])
        return own[number]
