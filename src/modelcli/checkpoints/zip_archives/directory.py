"""The directory of a zip archive, read strictly: what is shown must be what every program finds in the file.

Programs differ in what they make of an ambiguous archive: which of two records of one name they take, whether they
believe the directory or a record's own header. Such an archive is refused with a name for what is wrong.

The layout is that of PKWARE's APPNOTE.TXT, sections 4.3 (headers) and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import BinaryIO, NamedTuple

from modelcli.checkpoints import limits
from modelcli.errors import FileFormatError

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
# Of the entries, of which there may be 100,000, without what nothing here asks for: versions, times.
_CENTRAL = struct.Struct("<4s4x2H4x3L3H4x2L")
_LOCAL = struct.Struct("<4s2x2H4x3L2H")
_MAX_COMMENT = 65_535
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1 | 0x2000, 0x8, 0x800
_STORED, _DEFLATED = 0, 8
#: So many times as large may compressed records become, and what `MODELCLI_MAX_EXPANSION` allows beyond.
_GROWTH = 20
#: The attribute of a folder, of MS-DOS: torch's reader looks at it whatever system wrote the archive.
_FOLDER = 0x10
_NOTHING = (0, 0, 0)
_16, _32 = 0xFFFF, 0xFFFF_FFFF


class Entry(NamedTuple):
    """One record: where its bytes lie in the file, how many, and their CRC-32 as the directory states it.

    One that is not `stored` as it is lies there in `packed` bytes; `method` is how (8 is deflate).
    """

    name: str
    offset: int
    nbytes: int
    crc: int
    stored: bool
    packed: int = 0
    method: int = _STORED


class _Listed(NamedTuple):
    """A record as the directory has it, its place not yet looked at."""

    name: bytes
    header: int
    nbytes: int
    compressed: int
    crc: int
    method: int
    flags: int


def read(file: BinaryIO, size: int, where: str, *, start: int = 0) -> dict[str, Entry]:
    """The records of the archive that takes `size` bytes of `file` from `start`, by name.

    Offsets in what is returned count from the start of the file. Raises FileFormatError that starts with `where` for
    an archive that is damaged, ambiguous or beyond a limit.
    """
    count, offset, length = _end(file, size, where, start)
    file.seek(start + offset)
    listed = _listed(file.read(length), count, where)
    entries = _located(file, listed, offset, where, start)
    _check_growth(entries.values(), where)
    return entries


def contents(file: BinaryIO, entry: Entry, where: str) -> bytes:
    """The bytes of a small record, checked against their CRC-32. The caller has looked at its size.

    A CRC-32 of 0 is none: torch writes it where it is told to count none (`set_crc32_options(False)`).
    """
    require_method(entry, where)
    file.seek(entry.offset)
    if entry.stored:
        data = file.read(entry.nbytes)
    else:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(entry.packed), entry.nbytes + 1)
        except zlib.error as error:
            raise FileFormatError(f"{where} is damaged: record {entry.name}: {error}") from None
    if len(data) != entry.nbytes or entry.crc not in (0, zlib.crc32(data)):
        raise FileFormatError(f"{where} is damaged: record {entry.name} does not have the CRC-32 that is stated")
    return data


def require_method(entry: Entry, where: str) -> None:
    """Raise FileFormatError for a record that is compressed in another way than deflate."""
    if not entry.stored and entry.method != _DEFLATED:
        raise FileFormatError(
            f"{where}: record {entry.name} is compressed by method {entry.method}, and modelcli reads stored and "
            "deflated records only",
            "unpack the archive, and pack it again with zip -0 -r",
        )


def _check_growth(entries: Iterable[Entry], where: str) -> None:
    """Raise FileFormatError where little compressed bytes come to much: that is checked before any are inflated.

    Weights hardly shrink. What is left over `_GROWTH` times is for files with few bytes, and those full of zeros.
    """
    packed = nbytes = 0
    for entry in entries:
        if not entry.stored:
            packed, nbytes = packed + entry.packed, nbytes + entry.nbytes
    if nbytes > _GROWTH * packed + limits.EXPANSION.value:
        more = f"{nbytes:,} bytes in {packed:,} compressed ones, which is over {_GROWTH} times as many and more than it"
        raise limits.EXPANSION.exceeded(where, more)


def _end(file: BinaryIO, size: int, where: str, start: int) -> tuple[int, int, int]:
    """How many records there are, and where the directory starts and how long it is."""
    tail_length = min(size, _END.size + _MAX_COMMENT)
    file.seek(start + size - tail_length)
    tail = file.read(tail_length)
    position = tail.rfind(b"PK\x05\x06")
    if position < 0 or position + _END.size > len(tail):
        raise FileFormatError(f"{where} is a damaged zip file: it has no directory", "it may have been cut off")
    _, disk, first_disk, here, count, length, offset, comment = _END.unpack_from(tail, position)
    if position + _END.size + comment != len(tail):
        raise FileFormatError(f"{where} is a damaged zip file: there are bytes behind its end")
    if disk or first_disk or here != count:
        raise FileFormatError(f"{where} is one part of several of a zip archive")
    end = size - tail_length + position
    locator = position - _END64_LOCATOR.size
    if locator >= 0 and tail.startswith(b"PK\x06\x07", locator):
        end, stated = _end64(file, end - _END64_LOCATOR.size, tail[locator:position], where, start)
        # A field of the shorter form holds the same, or that it is too small to hold it.
        for short, full, largest in zip((count, length, offset), stated, (_16, _32, _32), strict=True):
            if short not in (full, largest):
                raise FileFormatError(f"{where} is a damaged zip file: its end states two sizes of the directory")
        count, length, offset = stated
    limits.ZIP_ENTRIES.check(count, where)
    if offset + length != end or length < count * _CENTRAL.size:
        raise FileFormatError(f"{where} is a damaged zip file: its directory is not where its end says")
    return count, offset, length


def _end64(file: BinaryIO, locator_at: int, locator: bytes, where: str, start: int) -> tuple[int, tuple[int, int, int]]:
    """Where the zip64 end record starts, and its count of records, length and offset of the directory."""
    _, _, position, disks = _END64_LOCATOR.unpack(locator)
    if disks > 1 or position + _END64.size > locator_at:
        raise FileFormatError(f"{where} is a damaged zip file: its zip64 end is not where it says")
    file.seek(start + position)
    fields = _END64.unpack(file.read(_END64.size))
    if fields[0] != b"PK\x06\x06" or position + 12 + fields[1] != locator_at or fields[4] or fields[5]:
        raise FileFormatError(f"{where} is a damaged zip file: its zip64 end is not where it says")
    here, count, length, offset = fields[6:]
    if here != count:
        raise FileFormatError(f"{where} is one part of several of a zip archive")
    return position, (count, length, offset)


def _listed(data: bytes, count: int, where: str) -> list[_Listed]:
    """The entries of the directory. They fill it to its last byte."""
    found = []
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
                raise FileFormatError(f"{where} is a damaged zip file: an entry of its directory is none")
            if marks & _FOLDER and (nbytes or not name.endswith(b"/")):
                raise FileFormatError(
                    f"{where}: the record {name!r} is marked as a folder, and torch reads nothing of it"
                )
            if name.endswith(b"/") and nbytes:
                raise FileFormatError(f"{where}: the record {name!r} is a folder, and has {nbytes:,} bytes")
            found.append(_Listed(name, header, nbytes, compressed, crc, method, flags))
    except struct.error:
        position = -1
    if position != len(data):
        raise FileFormatError(f"{where} is a damaged zip file: its directory does not hold {count:,} entries")
    return found


def _zip64(extra: bytes, fields: Iterable[int], where: str) -> list[int]:
    """The sizes and the offset of an entry, from its extra field where four bytes are too few for them."""
    blocks = []
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            blocks.append(extra[position + 4 : position + 4 + length])
        position += 4 + length
    wide = sum(field == _32 for field in fields)
    if len(blocks) != 1 or len(blocks[0]) < 8 * wide:
        raise FileFormatError(f"{where} is a damaged zip file: an entry's zip64 sizes are missing")
    numbers = iter(struct.unpack_from(f"<{wide}Q", blocks[0]))
    return [next(numbers) if field == _32 else field for field in fields]


def _located(file: BinaryIO, listed: list[_Listed], directory: int, where: str, start: int) -> dict[str, Entry]:
    """The entries with the places of their bytes, each as its own header has it, none over another."""
    found: dict[str, Entry] = {}
    end, last = 0, b""
    longest = limits.NAME_BYTES.value
    for entry in sorted(listed, key=itemgetter(1)):
        raw, at, nbytes, compressed, crc, method, flags = entry
        if at < end:
            raise FileFormatError(f"{where}: the records {last!r} and {raw!r} lie over one another")
        if len(raw) > longest:
            limits.NAME_BYTES.check(len(raw), f"{where}: the name of a record")
        file.seek(start + at)
        header = file.read(_LOCAL.size + len(raw))
        if not header.startswith(b"PK\x03\x04") or len(header) < _LOCAL.size + len(raw):
            raise FileFormatError(f"{where} is damaged: record {raw!r} has no header")
        fields = _LOCAL.unpack_from(header)
        _, own_flags, own_method, own_crc, own_compressed, own_nbytes, name_size, extra_size = fields
        if name_size != len(raw) or not header.endswith(raw):
            raise FileFormatError(f"{where} is damaged: record {raw!r} has another name in its own header")
        sizes = (own_crc, own_compressed, own_nbytes)
        left_open = flags & _DESCRIPTOR and sizes == _NOTHING  # as torch writes it
        if own_flags != flags or own_method != method or not (left_open or sizes == (crc, compressed, nbytes)):
            _compare(entry, own_flags, own_method, sizes, where)
        if flags & _ENCRYPTED:
            raise FileFormatError(f"{where}: record {raw!r} is encrypted")
        if method == _STORED and compressed != nbytes:
            raise FileFormatError(f"{where} is damaged: record {raw!r} is stored, and has two sizes")
        offset = at + len(header) + extra_size
        end, last = offset + compressed, raw
        if end > directory:
            raise FileFormatError(f"{where} is cut off: record {raw!r} ends behind the records")
        name = _name(raw, flags, where)
        found[name] = Entry(name, start + offset, nbytes, crc, method == _STORED, compressed, method)
    _refuse_twins(found, listed, where)
    return found


def _compare(entry: _Listed, flags: int, method: int, sizes: Iterable[int], where: str) -> None:
    """Raise FileFormatError where a record's own header says other than the directory.

    It may leave sizes and CRC-32 to a descriptor behind the bytes, and sizes of more than four bytes to its extra
    field.
    """
    left_open = 0 if flags & _DESCRIPTOR else None
    stated = ((entry.crc, None), (entry.compressed, _32), (entry.nbytes, _32))
    same = all(own in (said, wide, left_open) for own, (said, wide) in zip(sizes, stated, strict=True))
    if method != entry.method or not same or (flags ^ entry.flags) & (_ENCRYPTED | _UTF8):
        raise FileFormatError(f"{where} is damaged: record {entry.name!r} is another in its own header")


def _name(raw: bytes, flags: int, where: str) -> str:
    """The name of a record: torch looks for bytes, and knows nothing of the flag that says which letters they are."""
    if b"\0" in raw:
        raise FileFormatError(f"{where}: the name of the record {raw!r} has a NUL in it, where programs end it")
    try:
        return str(raw, "utf-8", "strict" if flags & _UTF8 else "surrogateescape")
    except UnicodeDecodeError:
        raise FileFormatError(f"{where} is a damaged zip file: the name {raw!r} is not UTF-8") from None


def _refuse_twins(found: Mapping[str, Entry], listed: list[_Listed], where: str) -> None:
    """Two records of one name: programs differ in which they take, and some do not tell capitals from small letters."""
    if len({name.lower() for name in found}) == len(listed):
        return
    seen: set[str] = set()
    for entry in listed:
        name = _name(entry.name, entry.flags, where)
        if name.lower() in seen:
            raise FileFormatError(f"{where} holds the record {name} twice")
        seen.add(name.lower())
