"""Compute the layout and the headers of an uncompressed zip archive before it is written.

The layout is that of PKWARE's APPNOTE.TXT, sections 4.3 (headers) and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from modelcli.checkpoints.layout import Output, place_like
from modelcli.checkpoints.plan import Source

#: The alignment that torch uses for tensors, so that they can be mapped.
ALIGNMENT = 64

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_STORED, _DATE = 0, 0x21  # the first of January 1980
_VERSION, _VERSION_64 = 20, 45
#: The flag for a name in UTF-8. Without it, programs decode names as cp437.
_UTF8 = 0x800
#: From this value on, a size or an offset needs the fields of zip64. The shorter fields then have their maximum.
ZIP64_FROM = 0xFFFF_FFFF
_16, _32 = 0xFFFF, 0xFFFF_FFFF


@dataclass(frozen=True)
class Placed:
    """A record with the offset of its header and the offset of its bytes."""

    name: bytes
    source: Source
    header: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.source.nbytes

    @property
    def _flags(self) -> int:
        return 0 if self.name.isascii() else _UTF8

    @property
    def _is_large(self) -> bool:
        return self.source.nbytes >= ZIP64_FROM

    def local_header(self, checksum: int) -> bytes:
        """Return the header before the bytes, padded with a field that readers skip, as torch does."""
        nbytes = self.source.nbytes
        extra = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if self._is_large else b""
        padding = self.offset - self.header - _LOCAL.size - len(self.name) - len(extra) - 4
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        size = _32 if self._is_large else nbytes
        version = _VERSION_64 if self._is_large else _VERSION
        fields = (
            b"PK\x03\x04",
            version,
            self._flags,
            _STORED,
            0,
            _DATE,
            checksum,
            size,
            size,
            len(self.name),
            len(extra),
        )
        return _LOCAL.pack(*fields) + self.name + extra

    @property
    def central_bytes(self) -> int:
        """The size of `central_header`."""
        wide = 2 * self._is_large + (self.header >= ZIP64_FROM)
        return _CENTRAL.size + len(self.name) + (4 + 8 * wide if wide else 0)

    def central_header(self, checksum: int) -> bytes:
        """Return the record's entry in the directory."""
        nbytes = self.source.nbytes
        wide = [nbytes, nbytes] if self._is_large else []
        if self.header >= ZIP64_FROM:
            wide.append(self.header)
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size = _32 if self._is_large else nbytes
        header = _32 if self.header >= ZIP64_FROM else self.header
        version = _VERSION_64 if wide else _VERSION
        fields = (b"PK\x01\x02", version, version, self._flags, _STORED, 0, _DATE, checksum, size, size)
        return _CENTRAL.pack(*fields, len(self.name), len(extra), 0, 0, 0, 0, header) + self.name + extra


def place(records: Sequence[tuple[str, Source]]) -> list[Placed]:
    """Place records one after another, each aligned; a large one so that it can be copied fast from its file.

    Names are written in UTF-8. Raises UnicodeEncodeError for a name that cannot be encoded.
    """
    placed: list[Placed] = []
    position = 0
    for text, source in records:
        name = text.encode()
        header = _LOCAL.size + len(name) + (20 if source.nbytes >= ZIP64_FROM else 0) + 4
        offset = place_like(source, position + header, ALIGNMENT)
        placed.append(Placed(name, source, position, offset))
        position = placed[-1].end
    return placed


def _end_of(placed: Sequence[Placed]) -> int:
    """Return the offset of the end of the last record."""
    return placed[-1].end if placed else 0


def directory(placed: Sequence[Placed], checksums: Sequence[int]) -> bytes:
    """Return the bytes after the records: the directory with an entry for each, and the end record that locates it."""
    entries = b"".join([record.central_header(crc) for record, crc in zip(placed, checksums, strict=True)])
    return entries + _end_records(_end_of(placed), len(placed), len(entries))


def _end_records(start: int, count: int, length: int) -> bytes:
    """Return what follows a directory of `length` bytes at `start` that has `count` entries."""
    end = b""
    if count >= _16 or length >= ZIP64_FROM or start >= ZIP64_FROM:
        end += _END64.pack(
            *(b"PK\x06\x06", _END64.size - 12, _VERSION_64, _VERSION_64, 0, 0),
            *(count, count, length, start),
        )
        end += _END64_LOCATOR.pack(b"PK\x06\x07", 0, start + length, 1)
        count, start = min(count, _16), _32 if start >= ZIP64_FROM else start
    shown = (count, count, min(length, _32), start)
    return end + _END.pack(b"PK\x05\x06", 0, 0, *shown, 0)


def size_of(placed: Sequence[Placed]) -> int:
    """Return the size of the archive, which does not depend on the checksums."""
    start, length = _end_of(placed), sum(record.central_bytes for record in placed)
    return start + length + len(_end_records(start, len(placed), length))


@dataclass(frozen=True)
class ZipLayout:
    """The layout of an archive: its records with their offsets."""

    records: Sequence[Placed]

    @cached_property
    def nbytes(self) -> int:
        return size_of(self.records)

    def parts(self) -> Iterator[tuple[int, Source]]:
        """Return the offset of each source."""
        return ((record.offset, record.source) for record in self.records)

    def write(self, output: Output) -> None:
        """Write the archive. The header of a record is written after its bytes, because it states their checksum."""
        checksums = []
        for record in self.records:
            checksums.append(output.put_with_checksum(record.offset, record.source))
            output.write(record.header, record.local_header(checksums[-1]))
        output.write(_end_of(self.records), directory(self.records, checksums))
