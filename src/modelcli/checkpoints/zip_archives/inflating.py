"""Read the records of a zip archive that are compressed.

The archive states the size of a record, which is checked before memory is allocated: see `directory.read`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from modelcli.checkpoints.storage import CHUNK, FileId, Span, Windows, gathered
from modelcli.errors import FileFormatError


@dataclass(frozen=True, slots=True)
class Inflated:
    """The bytes of a compressed span of a file (zip method 8: raw deflate)."""

    packed: Span
    name: str
    nbytes: int
    crc: int
    in_sequence: ClassVar[bool] = True

    def files(self) -> Iterable[FileId]:
        return self.packed.files()

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in pieces of at most 8 MiB. Raises FileFormatError if they are not as the archive states."""
        decompressor, done, checksum = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0
        try:
            for packed in self.packed.chunks():
                while packed:
                    # One byte more than stated is enough to notice that there are too many.
                    piece = decompressor.decompress(packed, min(CHUNK, self.nbytes - done + 1))
                    done += len(piece)
                    if done > self.nbytes:
                        raise self._damaged(f"has more than the {self.nbytes:,} bytes that the archive states")
                    checksum = zlib.crc32(piece, checksum)
                    if piece:
                        yield piece
                    packed = decompressor.unconsumed_tail
                    if decompressor.eof and (packed or decompressor.unused_data):
                        raise self._damaged("has further bytes after the end of its compressed data")
        except zlib.error as error:
            raise self._damaged(str(error)) from None
        if done != self.nbytes or not decompressor.eof:
            raise self._damaged(f"has {done:,} bytes, but the archive states {self.nbytes:,}")
        if self.crc and checksum != self.crc:
            raise self._damaged("does not have the CRC-32 that the archive states")

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """Return the bytes in new memory."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> Inflated | InflatedPart:
        return self if (start, nbytes) == (0, self.nbytes) else InflatedPart(self, start, nbytes)

    def _damaged(self, why: str) -> FileFormatError:
        return FileFormatError.damaged(str(self.packed.path), f"record {self.name} {why}")


@dataclass(frozen=True, slots=True)
class InflatedPart:
    """The `nbytes` bytes from `start` of a compressed record. All bytes before are decompressed and dropped."""

    whole: Inflated
    start: int
    nbytes: int
    in_sequence: ClassVar[bool] = True

    def files(self) -> Iterable[FileId]:
        return self.whole.files()

    def chunks(self) -> Iterator[bytes]:
        position, stop = 0, self.start + self.nbytes
        for piece in self.whole.chunks():
            if part := piece[max(self.start - position, 0) : max(stop - position, 0)]:
                yield part
            position += len(piece)

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        return memoryview(bytearray(self.bytes()))

    def part(self, start: int, nbytes: int) -> InflatedPart:
        return InflatedPart(self.whole, self.start + start, nbytes)
