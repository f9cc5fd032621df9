"""The bytes of tensors whose elements several ranks hold, and of buffers that are read as float32."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from modelcli.checkpoints.storage import CHUNK, FileId, Storage, Windows, gathered

#: The dtypes that `AsFloat32` reads, with the bytes of an element.
WIDENED = {"bfloat16": 2, "float16": 2, "float64": 8}
#: Floats that Python makes one by one are made for so many bytes at a time.
_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class Gathered:
    """The bytes of a tensor of which each rank has one part of the same length, the last one with padding behind it.

    Nothing but the numbers is kept for each tensor: a model may have 100,000 tensors on 1,000 ranks.

    Attributes:
        ranks: all that each rank holds; the same for all tensors.
        offset: the first byte of the tensor's part in what a rank holds.
        length: the bytes of a part.
        start: the first byte of the tensor that this storage stands for.
        nbytes: how many bytes it stands for.
    """

    ranks: tuple[Storage, ...]
    offset: int
    length: int
    start: int
    nbytes: int

    def pieces(self) -> Iterator[Storage]:
        """Yield the parts of the ranks, without the padding."""
        position, stop = self.start, self.start + self.nbytes
        while position < stop:
            rank, inside = divmod(position, self.length)
            count = min(self.length - inside, stop - position)
            yield self.ranks[rank].part(self.offset + inside, count)
            position += count

    def files(self) -> Iterable[FileId]:
        return {file for piece in self.pieces() for file in piece.files()}

    def chunks(self) -> Iterator[bytes | memoryview]:
        for piece in self.pieces():
            yield from piece.chunks()

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """Return the bytes in new memory, because separate parts cannot be mapped together."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> Gathered:
        return Gathered(self.ranks, self.offset, self.length, self.start + start, nbytes)


@dataclass(frozen=True, slots=True)
class AsFloat32:
    """Elements of another floating dtype as float32, as `Tensor.float()` gives them.

    Attributes:
        source: the elements.
        dtype: their dtype, one of `WIDENED`.
        start: the first byte of the float32 elements that this storage stands for.
        nbytes: how many bytes it stands for.
    """

    source: Storage
    dtype: str
    start: int
    nbytes: int

    def files(self) -> Iterable[FileId]:
        return self.source.files()

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, self.nbytes, CHUNK):
            yield self.part(start, min(CHUNK, self.nbytes - start)).bytes()

    def bytes(self) -> bytes:
        return bytes(self.mapped())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        first, last = self.start // 4, -(-(self.start + self.nbytes) // 4)
        item = WIDENED[self.dtype]
        made = bytearray()
        for start in range(first, last, _STEP // item):
            count = min(_STEP // item, last - start)
            made += _as_float32(self.source.part(start * item, count * item).bytes(), self.dtype)
        return memoryview(made)[self.start - 4 * first :][: self.nbytes]

    def part(self, start: int, nbytes: int) -> AsFloat32:
        return AsFloat32(self.source, self.dtype, self.start + start, nbytes)


def as_float32(source: Storage, dtype: str) -> AsFloat32:
    """Return the whole elements of a storage as float32. `dtype` is one of `WIDENED`."""
    return AsFloat32(source, dtype, 0, source.nbytes // WIDENED[dtype] * 4)


def _as_float32(data: bytes, dtype: str) -> bytes | bytearray:
    if dtype == "bfloat16":  # the upper half of a float32
        made = bytearray(2 * len(data))
        made[2::4], made[3::4] = data[::2], data[1::2]
        return made
    letter = "e" if dtype == "float16" else "d"
    return array("f", (number for (number,) in struct.iter_unpack(f"<{letter}", data))).tobytes()
