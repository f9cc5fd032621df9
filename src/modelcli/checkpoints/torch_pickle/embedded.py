"""Read archives of `torch.save` that are parts of a larger file, each on its own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from modelcli.checkpoints import limits, shapes
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.safetensors import looks_like
from modelcli.checkpoints.safetensors import reading as safetensors
from modelcli.checkpoints.storage import CHUNK, FileId, Identity, Span, Storage, Windows, require_unchanged
from modelcli.checkpoints.torch_pickle import pickles, zip_format
from modelcli.errors import FileFormatError, SystemFailureError, UnsafeError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Shape
from modelcli.wording import listed

#: The formats of memoryview by the bytes of an element.
_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True)
class ArchiveSpan:
    """The part of a file that is an archive: `length` bytes from `offset`. `name` is its content, for messages."""

    path: Path
    offset: int
    length: int
    identity: Identity
    name: str

    def __str__(self) -> str:
        return f"{self.path}: {self.name}, at byte {self.offset:,}"


def read(span: ArchiveSpan, budget: limits.Budget | None = None) -> pickles.Pickle:
    """Return the pickle of an archive. The bytes of tensors are not read. `budget` belongs to all archives of a folder.

    Raises FileFormatError if the bytes are not such an archive.
    """
    require_unchanged(span.path, span.identity)
    try:
        with span.path.open("rb") as file:
            file.seek(span.offset)
            _expect_archive(span, file.read(min(64, span.length)))
            archive = zip_format.archive_in(file, span.path, span.identity, str(span), span.offset, span.length)
            return archive.pickled(file, budget)
    except OSError as error:
        raise SystemFailureError(f"cannot read {span.path}: {error.strerror or error}") from None


def _expect_archive(span: ArchiveSpan, head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        return
    raise FileFormatError.damaged(str(span), f"it should be an archive of torch.save, but starts with {head[:8]!r}")


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """The bytes of a tensor that was saved as an archive, in row-major order.

    The archive is opened when the bytes are needed. Then FileFormatError is raised if it contains anything but one
    tensor of this shape and dtype.
    """

    span: ArchiveSpan
    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def files(self) -> Iterable[FileId]:
        return ((self.span.path, self.span.identity),)

    def pieces(self) -> Iterable[Storage]:
        return (self._located(),)

    def chunks(self) -> Iterator[bytes | memoryview]:
        yield from self._located().chunks()

    def bytes(self) -> bytes:
        return self._located().bytes()

    def mapped(self, windows: Windows | None = None) -> memoryview:
        return self._located().mapped(windows)

    def part(self, start: int, nbytes: int) -> Storage:
        return self._located().part(start, nbytes)

    def _located(self) -> Storage:
        return _located(self)

    def located(self) -> Storage:
        """Find the bytes: the archive is opened."""
        if (found := _in_safetensors(self.span)) is not None:
            if (found.shape, found.dtype) != (self.shape, self.dtype):
                raise self._is_another(found)
            return found.storage
        pickled = read(self.span)
        tensor = pickled.value
        if pickled.foreign:
            raise UnsafeError(
                f"{self.span} contains objects of {listed(pickled.foreign, 3)}, and loading them would run code"
            )
        if not isinstance(tensor, TensorEntry) or not isinstance(record := tensor.storage, Span):
            raise FileFormatError.damaged(str(self.span), "it should contain one dense tensor")
        if (tensor.shape, tensor.dtype) != (self.shape, self.dtype):
            raise self._is_another(tensor)
        item = ITEM_BYTES[self.dtype]
        nbytes = shapes.extent(tensor.shape, tensor.stride) * item
        span = Span(record.path, record.offset + tensor.offset * item, nbytes, record.identity)
        axes = [axis for axis, size in enumerate(tensor.shape) if size != 1]
        wanted = shapes.row_major(tensor.shape)
        if 0 in tensor.shape or all(tensor.stride[axis] == wanted[axis] for axis in axes):
            return span
        if any(tensor.stride[axis] == 0 for axis in axes):
            raise FileFormatError.damaged(
                str(self.span), "it contains an expanded tensor, which does not store each element"
            )
        return Reordered(span, tensor.shape, tensor.stride, item)

    def _is_another(self, found: TensorEntry) -> FileFormatError:
        return FileFormatError.damaged(
            str(self.span), f"it is {found.dtype} {list(found.shape)}, but should be {self.dtype} {list(self.shape)}"
        )


@functools.lru_cache(maxsize=1024)
def _located(span: TensorSpan) -> Storage:
    """Return the bytes of a tensor. A tensor that several ranks hold blocks of is read in pieces of each block."""
    return span.located()


def _in_safetensors(span: ArchiveSpan) -> TensorEntry | None:
    """Return the tensor if the file of the rank is a safetensors file (SerializationFormat.SAFETENSORS), else None.

    For such files the `.metadata` does not state where a tensor is; the header of the file does.
    """
    require_unchanged(span.path, span.identity)
    with span.path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04") or not looks_like(head):
        return None
    entry = _header_of(span.path, span.identity).get(span.name)
    if not isinstance(entry, TensorEntry):
        raise FileFormatError.damaged(
            str(span.path), f"it has no dense tensor {span.name}, which the metadata of its folder lists"
        )
    return entry


@functools.lru_cache(maxsize=4)
def _header_of(path: Path, _identity: Identity) -> Mapping[str, TensorEntry | CompositeEntry]:
    return safetensors.read(path).tensors


@dataclass(frozen=True, slots=True)
class Reordered:
    """The elements of a strided view, copied into row-major order in memory. `item` is the bytes of an element."""

    span: Storage
    shape: Shape
    stride: Shape
    item: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.item

    def files(self) -> Iterable[FileId]:
        return self.span.files()

    def chunks(self) -> Iterator[bytes | memoryview]:
        for start in range(0, self.nbytes, CHUNK):
            yield self.part(start, min(CHUNK, self.nbytes - start)).mapped()

    def bytes(self) -> bytes:
        return bytes(self.mapped())

    def part(self, start: int, nbytes: int) -> Storage:
        """Return a part, which reorders only the rows that it needs."""
        if not nbytes or not self.shape:
            return _Part(self, start, nbytes)
        row = self.nbytes // self.shape[0]
        first, last = start // row, -(-(start + nbytes) // row)
        begin = first * self.stride[0] * self.item
        shape, stride = (last - first, *self.shape[1:]), self.stride
        if last - first == 1 and len(shape) > 1:
            shape, stride = shape[1:], stride[1:]
        span = self.span.part(begin, shapes.extent(shape, stride) * self.item)
        rows = Reordered(span, shape, stride, self.item)
        if len(shape) < len(self.shape):
            return rows.part(start - first * row, nbytes)
        return _Part(rows, start - first * row, nbytes)

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """Return a copy, made one slice of the longest axis at a time."""
        unit = min(self.item, 8)
        shape = (*self.shape, self.item // unit)
        stride = (*(step * shape[-1] for step in self.stride), 1)
        format_ = _FORMATS[unit]
        found = self.span.mapped().cast(format_)
        ordered = memoryview(bytearray(self.nbytes))
        target, target_stride = ordered.cast(format_), shapes.row_major(shape)
        longest = shape.index(max(shape))
        count, step, target_step = shape[longest], stride[longest], target_stride[longest]
        outer = [range(size) if axis != longest else range(1) for axis, size in enumerate(shape)]
        for index in itertools.product(*outer):
            here = sum(map(int.__mul__, index, stride))
            there = sum(map(int.__mul__, index, target_stride))
            values = found[here : here + (count - 1) * step + 1 : step]
            target[there : there + (count - 1) * target_step + 1 : target_step] = values
        return ordered


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of reordered elements; the rows of `whole` are reordered to read it."""

    whole: Reordered
    start: int
    nbytes: int

    def files(self) -> Iterable[FileId]:
        return self.whole.files()

    def chunks(self) -> Iterator[bytes | memoryview]:
        for start in range(0, self.nbytes, CHUNK):
            yield self.part(start, min(CHUNK, self.nbytes - start)).mapped()

    def bytes(self) -> bytes:
        return bytes(self.mapped())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        return self.whole.mapped()[self.start : self.start + self.nbytes]

    def part(self, start: int, nbytes: int) -> Storage:
        return self.whole.part(self.start + start, nbytes)
