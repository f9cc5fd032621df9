"""Where the bytes of an archive's records come from: a span of the file, or a span that is inflated as it is read.

What a record comes to is stated in the archive and checked before memory is taken: see `directory.read`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modelcli.checkpoints.storage import CHUNK, FileId, Identity, Span, Storage, Windows, gathered
from modelcli.checkpoints.zip_archives.directory import Entry, require_method
from modelcli.errors import FileFormatError


def storage_of(entry: Entry, path: Path, identity: Identity, where: str) -> Storage:
    """The bytes of a record; nothing is read yet.

    Args:
        entry: the record, as `directory.read` gives it.
        path: the file that the archive lies in.
        identity: that of the file when the directory was read.
        where: names the archive in the error.

    Raises FileFormatError for a record that is neither stored nor deflated.
    """
    require_method(entry, where)
    if entry.stored:
        return Span(path, entry.offset, entry.nbytes, identity)
    return Inflated(Span(path, entry.offset, entry.packed, identity), entry.name, entry.nbytes, entry.crc)


@dataclass(frozen=True, slots=True)
class Inflated:
    """The bytes that a span of a file is the compressed form of (method 8 of zip: raw deflate)."""

    packed: Span
    name: str
    nbytes: int
    crc: int
    in_sequence: ClassVar[bool] = True

    def files(self) -> Iterable[FileId]:
        return self.packed.files()

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in pieces of at most 8 MiB. Raises FileFormatError where they are not what is stated."""
        machine, done, checksum = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0
        try:
            for packed in self.packed.chunks():
                while packed:
                    # One byte more than is stated shows that there are more.
                    piece = machine.decompress(packed, min(CHUNK, self.nbytes - done + 1))
                    done += len(piece)
                    if done > self.nbytes:
                        raise self._damaged("comes to more bytes than it states")
                    checksum = zlib.crc32(piece, checksum)
                    if piece:
                        yield piece
                    packed = machine.unconsumed_tail
                    if machine.eof and (packed or machine.unused_data):
                        raise self._damaged("has bytes behind its end")
        except zlib.error as error:
            raise self._damaged(str(error)) from None
        if done != self.nbytes or not machine.eof:
            raise self._damaged(f"states {self.nbytes:,} bytes and comes to {done:,}")
        if self.crc and checksum != self.crc:
            raise self._damaged("does not have the CRC-32 that is stated")

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """The bytes in memory of their own."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> Inflated | InflatedPart:
        return self if (start, nbytes) == (0, self.nbytes) else InflatedPart(self, start, nbytes)

    def _damaged(self, why: str) -> FileFormatError:
        return FileFormatError(f"{self.packed.path} is damaged: record {self.name} {why}")


@dataclass(frozen=True, slots=True)
class InflatedPart:
    """`nbytes` of them, from `start`: what stands before has to be inflated as well, and is let go."""

    whole: Inflated
    start: int
    nbytes: int
    in_sequence: ClassVar[bool] = True

    def files(self) -> Iterable[FileId]:
        return self.whole.files()

    def chunks(self) -> Iterator[bytes]:
        place, stop = 0, self.start + self.nbytes
        for piece in self.whole.chunks():
            if part := piece[max(self.start - place, 0) : max(stop - place, 0)]:
                yield part
            place += len(piece)

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        return memoryview(bytearray(self.bytes()))

    def part(self, start: int, nbytes: int) -> InflatedPart:
        return InflatedPart(self.whole, self.start + start, nbytes)
