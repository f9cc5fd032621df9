"""The format of `torch.save` since 1.6: a zip archive of stored records, with the tree of values as a pickle."""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from modelcli import record as records
from modelcli.checkpoints import pickles, trees
from modelcli.checkpoints.contents import Contents, Span, identity_of
from modelcli.errors import FileFormatError, ModelcliError, SystemFailureError

MAX_PICKLE_BYTES = 64 * 1024 * 1024
MAX_RECORDS = 1_000_000


def read(path: Path, key: str | None) -> Contents:
    """Read the directory, the pickle and the record of a torch zip file; no tensor's bytes are touched."""
    identity = identity_of(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive.infolist())
            pickle_name = _pickle_name(path, members)
            prefix = pickle_name.removesuffix("data.pkl")
            data = _read_member(path, archive, members[pickle_name])
            byteorder = members.get(f"{prefix}byteorder")
            if byteorder is not None and _read_member(path, archive, byteorder) not in (b"little", b""):
                raise FileFormatError(f"{path} was written on a big-endian machine", "load and save it with torch")
            record_text = _record_text(path, archive, members.get(f"{prefix}{records.ZIP_RECORD}"))
    except ModelcliError:
        raise
    except zipfile.BadZipFile as error:
        raise FileFormatError(f"{path} is a damaged zip file: {error}", "it may have been cut off") from None
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        # zipfile lets through what its decompressors and decoders raise, each its own kind.
        raise FileFormatError(f"{path} is a damaged zip file: {error}") from None
    pickled = pickles.read(data, f"{path}: {pickle_name}")
    try:
        with path.open("rb") as file:
            storages = _Storages(path, file, prefix, members, identity)
            return trees.contents_of(path, pickled, storages.span, key, record_text)
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None


def _members(path: Path, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by name. Raises FileFormatError where two have one name, or lie over one another.

    Programs differ in which of two records they read: what is shown must be what any of them loads.
    """
    if len(infos) > MAX_RECORDS:
        raise FileFormatError(f"{path} holds {len(infos):,} records; the limit is {MAX_RECORDS:,}")
    names = Counter(info.filename.lower() for info in infos)
    if len(names) != len(infos):
        raise FileFormatError(f"{path} holds the record {names.most_common(1)[0][0]} twice")
    end, last = 0, ""
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise FileFormatError(f"{path}: the records {last} and {info.filename} lie over one another")
        end, last = info.header_offset + 30 + info.compress_size, info.filename
    return {info.filename: info for info in infos}


def _pickle_name(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> str:
    names = [name for name in members if name == "data.pkl" or (name.count("/") == 1 and name.endswith("/data.pkl"))]
    if len(names) == 1:
        prefix = names[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in members:
            raise FileFormatError(f"{path} is a torch.jit archive", "save its state_dict() with torch.save instead")
        return names[0]
    if names:
        raise FileFormatError(f"{path} holds {len(names)} files named data.pkl: {', '.join(names[:3])}")
    raise FileFormatError(f"{path} is a zip file, but none that torch.save wrote: it holds no data.pkl")


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_PICKLE_BYTES:
        raise FileFormatError(f"{path}: {info.filename} is {info.file_size:,} bytes; the limit is {MAX_PICKLE_BYTES:,}")
    return archive.read(info)


def _record_text(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> str | None:
    """The record, or None where it is damaged: the tensors are there without it, and so is its copy."""
    if info is None:
        return None
    try:
        return _read_member(path, archive, info).decode()
    except (zipfile.BadZipFile, UnicodeDecodeError, FileFormatError):
        return None


class _Storages:
    """The records `data/N` of an archive as spans of the file, each checked against the zip directory."""

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        prefix: str,
        members: Mapping[str, zipfile.ZipInfo],
        identity: tuple[int, int, int],
    ) -> None:
        self.path = path
        self.file = file
        self.prefix = prefix
        self.members = members
        self.identity = identity
        self.spans: dict[str, Span] = {}

    def span(self, key: str) -> Span:
        if key not in self.spans:
            self.spans[key] = self._locate(f"{self.prefix}data/{key}")
        return self.spans[key]

    def _locate(self, name: str) -> Span:
        info = self.members.get(name)
        if info is None:
            raise FileFormatError(f"{self.path} is damaged: record {name} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
            raise FileFormatError(f"{self.path}: record {name} is compressed or encrypted; torch.save stores plainly")
        header = self._local_header(info.header_offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise FileFormatError(f"{self.path} is damaged: record {name} has no header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
        if self.file.read(name_length) != name.encode(encoding, "surrogateescape"):
            raise FileFormatError(f"{self.path} is damaged: record {name} has another name in its own header")
        offset = info.header_offset + 30 + name_length + extra_length
        if offset + info.file_size > self.identity[0]:
            raise FileFormatError(f"{self.path} is cut off: record {name} ends behind the end of the file")
        return Span(self.path, offset, info.file_size, self.identity)

    def _local_header(self, offset: int) -> bytes:
        """The 30 bytes of a local file header, or fewer where there is none."""
        if not 0 <= offset < self.identity[0]:
            return b""
        self.file.seek(offset)
        return self.file.read(30)
