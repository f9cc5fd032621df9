"""Archives of `torch.save` that lie whole inside a larger file, each read by itself."""

from __future__ import annotations

import io
import itertools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

from modelcli.blueprint import ITEM_BYTES, Shape
from modelcli.checkpoints import pickles, safetensors
from modelcli.checkpoints.contents import CHUNK, Span, Storage, identity_of, row_major
from modelcli.errors import FileFormatError, ModelcliError, SystemFailureError, UnsafeError

MAX_PICKLE_BYTES = 64 * 1024 * 1024
#: `torch.save` writes a handful of records around the storages; an entry of a state dict holds few of those.
MAX_RECORDS = 10_000


#: Elements of as many bytes as memoryview counts them.
_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an archive lies: `length` bytes of a file from `offset`. `name` is what it holds, for messages."""

    path: Path
    offset: int
    length: int
    identity: tuple[int, int, int]
    name: str

    def __str__(self) -> str:
        return f"{self.path}: {self.name}, at byte {self.offset:,}"


def read(place: Place) -> tuple[pickles.Pickle, Callable[[str], Span]]:
    """The value of an archive, and what gives the bytes of a storage by its key; those are not touched.

    Raises FileFormatError where what lies there is no such archive.
    """
    try:
        with place.path.open("rb") as file:
            if identity_of(place.path) != place.identity:
                raise FileFormatError(f"{place.path} changed while it was being read", "run the command again")
            window = _Window(file, place)
            _expect_archive(place, window.read(64) or b"")
            with zipfile.ZipFile(window) as archive:
                records = _records(place, window, archive.infolist())
                prefix = _prefix(place, records)
                data = _content(place, archive, f"{prefix}data.pkl")
                byteorder = f"{prefix}byteorder"
                if byteorder in records and _content(place, archive, byteorder) not in (b"little", b""):
                    raise FileFormatError(f"{place} was written on a big-endian machine", "load and save it with torch")
    except ModelcliError:
        raise
    except OSError as error:
        raise SystemFailureError(f"cannot read {place.path}: {error.strerror or error}") from None
    except Exception as error:
        # zipfile lets through what its decoders raise, each its own kind.
        raise FileFormatError(f"{place} is a damaged archive: {error}") from None

    def span_of(key: str) -> Span:
        record = records.get(f"{prefix}data/{key}")
        if record is None:
            raise FileFormatError(f"{place} is damaged: storage {key!r} is missing")
        start, nbytes = record
        return Span(place.path, place.offset + start, nbytes, place.identity)

    return pickles.read(data, str(place)), span_of


class _Window(io.RawIOBase):
    """The part of a file that holds an archive, as a file of its own."""

    def __init__(self, file: BinaryIO, place: Place) -> None:
        self.file = file
        self.place = place
        self.position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.place.length}[whence]
        if start + offset < 0:
            raise OSError("a position before the start")
        self.position = start + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self.file.seek(self.place.offset + self.position)
        data = self.file.read(max(min(len(view), self.place.length - self.position), 0))
        view[: len(data)] = data
        self.position += len(data)
        return len(data)


def _expect_archive(place: Place, head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        return
    if safetensors.looks_like(head, place.length):
        raise FileFormatError(
            f"{place} is in safetensors form (SerializationFormat.SAFETENSORS), which is not read here",
            "load and save it with torch.distributed.checkpoint",
        )
    raise FileFormatError(f"{place} is no archive that torch.save wrote: it starts with {head[:8]!r}")


def _records(place: Place, window: _Window, infos: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Where the bytes of each record lie in the archive: start and size, in bytes."""
    if len(infos) > MAX_RECORDS:
        raise FileFormatError(f"{place} holds {len(infos):,} records; the limit is {MAX_RECORDS:,}")
    if len({info.filename.lower() for info in infos}) != len(infos):
        raise FileFormatError(f"{place} is damaged: a record stands in it twice")
    infos = sorted(infos, key=lambda info: info.header_offset)
    if infos and infos[0].header_offset != 0:
        raise FileFormatError(f"{place} is damaged: there is something before its first record")
    found, end = {}, 0
    for info in infos:
        if info.header_offset < end:
            raise FileFormatError(f"{place} is damaged: record {info.filename} lies over the one before it")
        start = _start_of(place, window, info)
        end = start + info.file_size
        if end > place.length:
            raise FileFormatError(f"{place} is cut off: record {info.filename} ends behind its end")
        found[info.filename] = (start, info.file_size)
    return found


def _start_of(place: Place, window: _Window, info: zipfile.ZipInfo) -> int:
    """Where a record's bytes start, behind its own header, which has to agree with the directory."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1 or info.file_size != info.compress_size:
        raise FileFormatError(f"{place}: record {info.filename} is compressed or encrypted; torch.save stores plainly")
    window.seek(info.header_offset)
    header = window.read(30) or b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise FileFormatError(f"{place} is damaged: record {info.filename} has no header")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    if window.read(name_length) != info.filename.encode(encoding, "surrogateescape"):
        raise FileFormatError(f"{place} is damaged: record {info.filename} has another name in its own header")
    start: int = info.header_offset + 30 + name_length + extra_length
    return start


def _prefix(place: Place, records: dict[str, tuple[int, int]]) -> str:
    found = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise FileFormatError(f"{place} is no archive that torch.save wrote: it holds {len(found)} files data.pkl")
    return found[0].removesuffix("data.pkl")


def _content(place: Place, archive: zipfile.ZipFile, name: str) -> bytes:
    if (size := archive.getinfo(name).file_size) > MAX_PICKLE_BYTES:
        raise FileFormatError(f"{place}: {name} is {size:,} bytes; the limit is {MAX_PICKLE_BYTES:,}")
    return archive.read(name)


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """The bytes of a tensor that is an archive by itself, row-major.

    The archive is opened when the bytes are asked for; then FileFormatError is raised where it holds anything but
    one tensor of this shape and dtype.
    """

    place: Place
    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def chunks(self) -> Iterator[bytes]:
        yield from self._located().chunks()

    def bytes(self) -> bytes:
        return self._located().bytes()

    def mapped(self) -> memoryview:
        return self._located().mapped()

    def _located(self) -> Storage:
        pickled, span_of = read(self.place)
        tensor = pickled.value
        if pickled.foreign:
            raise UnsafeError(
                f"{self.place} holds objects of {', '.join(pickled.foreign[:3])}; to load them would run code"
            )
        if not isinstance(tensor, pickles.Tensor):
            raise FileFormatError(f"{self.place} is no dense tensor")
        if (tensor.shape, tensor.dtype) != (self.shape, self.dtype):
            raise FileFormatError(
                f"{self.place} is {tensor.dtype} {list(tensor.shape)}; it should be {self.dtype} {list(self.shape)}"
            )
        record, item = span_of(tensor.storage.key), ITEM_BYTES[self.dtype]
        last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
        needed = (last + 1) * item if 0 not in tensor.shape else tensor.offset * item
        if needed > record.nbytes:
            raise FileFormatError(f"{self.place} needs {needed:,} bytes, and its record holds {record.nbytes:,}")
        start = tensor.offset * item
        span = Span(record.path, record.offset + start, needed - start, record.identity)
        axes = [axis for axis, size in enumerate(tensor.shape) if size != 1]
        wanted = row_major(tensor.shape)
        if 0 in tensor.shape or all(tensor.stride[axis] == wanted[axis] for axis in axes):
            return span
        if any(tensor.stride[axis] == 0 for axis in axes):
            raise FileFormatError(f"{self.place} is an expanded tensor, and each element should be there by itself")
        return _Reordered(span, tensor.shape, tensor.stride, item)


@dataclass(frozen=True, slots=True)
class _Reordered:
    """The elements of a strided view, brought into row-major order in memory. `item` is an element's bytes."""

    span: Span
    shape: Shape
    stride: Shape
    item: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.item

    def chunks(self) -> Iterator[bytes]:
        ordered = self.mapped()
        for start in range(0, len(ordered), CHUNK):
            yield bytes(ordered[start : start + CHUNK])

    def bytes(self) -> bytes:
        return bytes(self.mapped())

    def mapped(self) -> memoryview:
        """A copy, made a slice of the longest axis at a time."""
        unit = min(self.item, 8)
        shape = (*self.shape, self.item // unit)
        stride = (*(step * shape[-1] for step in self.stride), 1)
        format_ = _FORMATS[unit]
        found = self.span.mapped().cast(format_)
        ordered = memoryview(bytearray(self.nbytes))
        target, target_stride = ordered.cast(format_), row_major(shape)
        longest = shape.index(max(shape))
        count, step, target_step = shape[longest], stride[longest], target_stride[longest]
        outer = [range(size) if axis != longest else range(1) for axis, size in enumerate(shape)]
        for index in itertools.product(*outer):
            here = sum(map(int.__mul__, index, stride))
            there = sum(map(int.__mul__, index, target_stride))
            values = found[here : here + (count - 1) * step + 1 : step]
            target[there : there + (count - 1) * target_step + 1 : target_step] = values
        return ordered
