"""Read the directory of a zip archive strictly, so that modelcli shows what every other program finds in the file.

Programs treat ambiguous archives differently: some take the first of two records with one name and some the last, some
believe the directory and some the header of each record. modelcli refuses such archives and says what is wrong.

The layout is that of PKWARE's APPNOTE.TXT, sections 4.3 (headers) and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from modelcli.checkpoints import limits
from modelcli.checkpoints.storage import Identity, Span, Storage
from modelcli.errors import FileFormatError

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
# Versions and times are skipped, because there may be 100,000 entries.
_CENTRAL = struct.Struct("<4s4x2H4x3L3H4x2L")
_LOCAL = struct.Struct("<4s2x2H4x3L2H")
_MAX_COMMENT = 65_535
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1 | 0x2000, 0x8, 0x800
_STORED, _DEFLATED = 0, 8
#: How many times as large the compressed records may become, in addition to `MODELCLI_MAX_EXPANSION`.
_GROWTH = 20
#: The MS-DOS attribute of a folder. torch's reader respects it whichever system wrote the archive.
_FOLDER = 0x10
_NOTHING = (0, 0, 0)
_16, _32 = 0xFFFF, 0xFFFF_FFFF


class Entry(NamedTuple):
    """One record of an archive.

    Attributes:
        name: its name.
        offset: where its bytes are in the file.
        nbytes: its size without compression.
        crc: its CRC-32 as the directory states it.
        stored: whether it is not compressed.
        packed: its compressed size.
        method: the compression method (8 is deflate).
    """

    name: str
    offset: int
    nbytes: int
    crc: int
    stored: bool
    packed: int = 0
    method: int = _STORED


class _Listed(NamedTuple):
    """A record as the directory lists it, before its own header is read."""

    name: bytes
    header: int
    nbytes: int
    compressed: int
    crc: int
    method: int
    flags: int


def read(file: BinaryIO, size: int, where: str, *, start: int = 0) -> dict[str, Entry]:
    """Return the records of an archive by name, with their offsets in the whole file.

    Args:
        file: the file.
        size: the size of the archive.
        where: the name of the archive in error messages.
        start: where the archive starts in the file.

    Raises:
        FileFormatError: the archive is damaged or ambiguous, or exceeds a limit.
    """
    count, offset, length = _end(file, size, where, start)
    file.seek(start + offset)
    listed = _listed(file.read(length), count, where)
    entries = _located(file, listed, offset, where, start)
    _check_growth(entries.values(), where)
    return entries


def contents(file: BinaryIO, entry: Entry, where: str) -> bytes:
    """Return the bytes of a small record, checked against its CRC-32. The caller has checked its size.

    A CRC-32 of 0 means that there is none: torch writes it after `set_crc32_options(False)`.
    """
    require_method(entry, where)
    file.seek(entry.offset)
    if entry.stored:
        data = file.read(entry.nbytes)
    else:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(entry.packed), entry.nbytes + 1)
        except zlib.error as error:
            raise FileFormatError.damaged(where, f"record {entry.name} cannot be decompressed: {error}") from None
    if len(data) != entry.nbytes or entry.crc not in (0, zlib.crc32(data)):
        raise FileFormatError.damaged(where, f"record {entry.name} does not have the CRC-32 that the archive states")
    return data


def require_method(entry: Entry, where: str) -> None:
    """Raise FileFormatError for a record that is compressed with another method than deflate."""
    if not entry.stored and entry.method != _DEFLATED:
        raise FileFormatError(
            f"{where}: record {entry.name} is compressed with method {entry.method}, but modelcli reads only deflate",
            "unpack the archive, and pack it again without compression: zip -0 -r",
        )


def storage_of(entry: Entry, path: Path, identity: Identity, where: str) -> Storage:
    """Return the bytes of a record. Nothing is read yet.

    Args:
        entry: the record, as `read` returns it.
        path: the file that contains the archive.
        identity: the identity of the file when the directory was read.
        where: the name of the archive in error messages.

    Raises:
        FileFormatError: the record is neither stored nor deflated.
    """
    require_method(entry, where)
    if entry.stored:
        return Span(path, entry.offset, entry.nbytes, identity)
    from modelcli.checkpoints.zip_archives.inflating import Inflated  # which hardly any file needs

    return Inflated(Span(path, entry.offset, entry.packed, identity), entry.name, entry.nbytes, entry.crc)


def _check_growth(entries: Iterable[Entry], where: str) -> None:
    """Raise FileFormatError if the compressed records would become much larger. This is checked before decompressing.

    Weights hardly compress. The extra allowance is for small files, and for files full of zeros.
    """
    packed = nbytes = 0
    for entry in entries:
        if not entry.stored:
            packed, nbytes = packed + entry.packed, nbytes + entry.nbytes
    if nbytes > _GROWTH * packed + limits.EXPANSION.value:
        raise FileFormatError(
            f"{where} has {packed:,} compressed bytes that would become {nbytes:,}: the limit is {_GROWTH} times as "
            f"many and {limits.EXPANSION.value:,} more",
            limits.EXPANSION.hint,
        )


def _end(file: BinaryIO, size: int, where: str, start: int) -> tuple[int, int, int]:
    """Return the number of records, and the offset and the length of the directory."""
    tail_length = min(size, _END.size + _MAX_COMMENT)
    file.seek(start + size - tail_length)
    tail = file.read(tail_length)
    position = tail.rfind(b"PK\x05\x06")
    if position < 0 or position + _END.size > len(tail):
        raise FileFormatError.damaged(where, "it is a zip file without a directory, so its end may be missing")
    _, disk, first_disk, here, count, length, offset, comment = _END.unpack_from(tail, position)
    if position + _END.size + comment != len(tail):
        raise FileFormatError.damaged(where, "it is a zip file with further bytes after its end")
    if disk or first_disk or here != count:
        raise FileFormatError(f"{where} is only one part of a split zip archive", "join all its parts to one file")
    end = size - tail_length + position
    locator = position - _END64_LOCATOR.size
    if locator >= 0 and tail.startswith(b"PK\x06\x07", locator):
        end, stated = _end64(file, end - _END64_LOCATOR.size, tail[locator:position], where, start)
        # A field of the shorter record has the same value, or its maximum if the value does not fit.
        for short, full, largest in zip((count, length, offset), stated, (_16, _32, _32), strict=True):
            if short not in (full, largest):
                raise FileFormatError.damaged(where, "its two end records state different sizes of the zip directory")
        count, length, offset = stated
    limits.ZIP_ENTRIES.check(count, where)
    if offset + length != end or length < count * _CENTRAL.size:
        raise FileFormatError.damaged(where, f"its zip directory is not at byte {offset:,}, as its end states")
    return count, offset, length


def _end64(file: BinaryIO, locator_at: int, locator: bytes, where: str, start: int) -> tuple[int, tuple[int, int, int]]:
    """Return the offset of the zip64 end record, and its number of records and length and offset of the directory."""
    _, _, position, disks = _END64_LOCATOR.unpack(locator)
    if disks > 1 or position + _END64.size > locator_at:
        raise FileFormatError.damaged(where, f"its zip64 end record is not at byte {position:,}, as the file states")
    file.seek(start + position)
    fields = _END64.unpack(file.read(_END64.size))
    if fields[0] != b"PK\x06\x06" or position + 12 + fields[1] != locator_at or fields[4] or fields[5]:
        raise FileFormatError.damaged(where, f"its zip64 end record is not at byte {position:,}, as the file states")
    here, count, length, offset = fields[6:]
    if here != count:
        raise FileFormatError(f"{where} is only one part of a split zip archive", "join all its parts to one file")
    return position, (count, length, offset)


def _listed(data: bytes, count: int, where: str) -> list[_Listed]:
    """Return the entries of the directory, which must fill it completely."""
    found: list[_Listed] = []
    position = 0
    try:
        for _ in range(count):
            fields = _CENTRAL.unpack_from(data, position)
            signature, flags, method, crc, compressed, nbytes, name_size, extra_size, comment_size, marks, header = (
                fields
            )
            position += _CENTRAL.size
            name = data[position : position + name_size]
            position += name_size
            if _32 in (nbytes, compressed, header):
                extra = data[position : position + extra_size]
                nbytes, compressed, header = _zip64(extra, (nbytes, compressed, header), where)
            position += extra_size + comment_size
            if signature != b"PK\x01\x02":
                raise FileFormatError.damaged(where, f"entry {len(found) + 1:,} of its zip directory is not valid")
            if marks & _FOLDER and (nbytes or not name.endswith(b"/")):
                raise FileFormatError(f"{where}: the record {name!r} is marked as a folder, so torch would not read it")
            if name.endswith(b"/") and nbytes:
                raise FileFormatError(f"{where}: the record {name!r} is a folder, but has {nbytes:,} bytes")
            found.append(_Listed(name, header, nbytes, compressed, crc, method, flags))
    except struct.error:
        position = -1
    if position != len(data):
        raise FileFormatError.damaged(where, f"its zip directory does not have the {count:,} entries that it states")
    return found


def _zip64(extra: bytes, fields: Iterable[int], where: str) -> list[int]:
    """Return the sizes and the offset of an entry; those that need more than four bytes are in its extra field."""
    blocks = []
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            blocks.append(extra[position + 4 : position + 4 + length])
        position += 4 + length
    wide = sum(field == _32 for field in fields)
    if len(blocks) != 1 or len(blocks[0]) < 8 * wide:
        raise FileFormatError.damaged(where, "an entry of its zip directory lacks its zip64 sizes")
    numbers = iter(struct.unpack_from(f"<{wide}Q", blocks[0]))
    return [next(numbers) if field == _32 else field for field in fields]


def _located(file: BinaryIO, listed: list[_Listed], directory: int, where: str, start: int) -> dict[str, Entry]:
    """Return the entries with the offsets of their bytes, after checking their own headers and that none overlap."""
    found: dict[str, Entry] = {}
    end, last = 0, b""
    longest = limits.NAME_BYTES.value
    for entry in sorted(listed, key=itemgetter(1)):
        raw, at, nbytes, compressed, crc, method, flags = entry
        if at < end:
            raise FileFormatError.damaged(where, f"the records {last!r} and {raw!r} overlap")
        if len(raw) > longest:
            limits.NAME_BYTES.check(len(raw), f"{where}: the name of a record")
        file.seek(start + at)
        header = file.read(_LOCAL.size + len(raw))
        if not header.startswith(b"PK\x03\x04") or len(header) < _LOCAL.size + len(raw):
            raise FileFormatError.damaged(where, f"record {raw!r} has no header at byte {start + at:,}")
        fields = _LOCAL.unpack_from(header)
        _, own_flags, own_method, own_crc, own_compressed, own_nbytes, name_size, extra_size = fields
        if name_size != len(raw) or not header.endswith(raw):
            raise FileFormatError.damaged(where, f"the header of record {raw!r} has a name other than the directory's")
        sizes = (own_crc, own_compressed, own_nbytes)
        left_open = flags & _DESCRIPTOR and sizes == _NOTHING  # as torch writes it
        if own_flags != flags or own_method != method or not (left_open or sizes == (crc, compressed, nbytes)):
            _compare(entry, own_flags, own_method, sizes, where)
        if flags & _ENCRYPTED:
            raise FileFormatError(
                f"{where}: record {raw!r} is encrypted",
                "unpack the archive with its password, and pack it with zip -0 -r",
            )
        if method == _STORED and compressed != nbytes:
            raise FileFormatError.damaged(where, f"record {raw!r} is not compressed, but states two sizes")
        offset = at + len(header) + extra_size
        end, last = offset + compressed, raw
        if end > directory:
            raise FileFormatError.damaged(where, f"record {raw!r} reaches into the zip directory")
        name = _name(raw, flags, where)
        found[name] = Entry(name, start + offset, nbytes, crc, method == _STORED, compressed, method)
    _refuse_duplicates(found, listed, where)
    return found


def _compare(entry: _Listed, flags: int, method: int, sizes: Iterable[int], where: str) -> None:
    """Raise FileFormatError if a record's own header contradicts the directory.

    The header may leave the sizes and CRC-32 to a descriptor after the bytes, and sizes of more than four bytes to its
    extra field.
    """
    left_open = 0 if flags & _DESCRIPTOR else None
    stated = ((entry.crc, None), (entry.compressed, _32), (entry.nbytes, _32))
    same = all(own in (narrow, wide, left_open) for own, (narrow, wide) in zip(sizes, stated, strict=True))
    if method != entry.method or not same or (flags ^ entry.flags) & (_ENCRYPTED | _UTF8):
        raise FileFormatError.damaged(where, f"the header of record {entry.name!r} contradicts the directory")


def _name(raw: bytes, flags: int, where: str) -> str:
    """Return the name of a record as text. torch compares bytes and ignores the flag that states their encoding."""
    if b"\0" in raw:
        raise FileFormatError(f"{where}: the record name {raw!r} contains NUL, where some programs end the name")
    try:
        return str(raw, "utf-8", "strict" if flags & _UTF8 else "surrogateescape")
    except UnicodeDecodeError:
        raise FileFormatError.damaged(where, f"the record name {raw!r} is not UTF-8, as its flag states") from None


def _refuse_duplicates(found: Mapping[str, Entry], listed: list[_Listed], where: str) -> None:
    """Refuse two records with one name, because programs differ in which they take. Some ignore case."""
    if len({name.lower() for name in found}) == len(listed):
        return
    seen: set[str] = set()
    for entry in listed:
        name = _name(entry.name, entry.flags, where)
        if name.lower() in seen:
            raise FileFormatError(
                f"{where} holds the record {name} twice, and programs differ in which of the two they read"
            )
        seen.add(name.lower())
