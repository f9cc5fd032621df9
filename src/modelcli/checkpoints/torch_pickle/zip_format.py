"""The format of `torch.save` since 1.6: a zip archive of stored records, with the tree of values as a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from modelcli.checkpoints import limits
from modelcli.checkpoints import record as records
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.storage import Storage
from modelcli.checkpoints.torch_pickle import pickles, trees
from modelcli.checkpoints.zip_archives import directory as zip_directory
from modelcli.checkpoints.zip_archives.directory import Entry
from modelcli.checkpoints.zip_archives.inflating import storage_of
from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.wording import listed


def read(candidate: Candidate, key: str | None) -> Contents:
    """Read the directory, the pickle and the record of a torch zip file; no tensor's bytes are touched."""
    archive = archive_of(candidate)
    try:
        with candidate.path.open("rb") as file:
            pickled = archive.pickled(file)
            record_text = archive.record_text(file)
            notes = archive.notes()
    except OSError as error:
        raise SystemFailureError(f"cannot read {candidate.path}: {error.strerror or error}") from None
    return trees.contents_of(candidate.path, pickled, key, record_text, notes)


def archive_of(candidate: Candidate) -> Archive:
    """The archive that is the whole of a file. Raises FileFormatError where torch.save does not write such a one."""
    where = str(candidate.path)
    entries = candidate.records
    return Archive(candidate.path, candidate.identity, where, _prefix(where, entries), entries)


@dataclass(frozen=True)
class Archive:
    """The records of an archive that `torch.save` wrote, all under one `prefix`; `where` names it in messages."""

    path: Path
    identity: tuple[int, int, int]
    where: str
    prefix: str
    entries: Mapping[str, Entry]

    def pickled(self, file: BinaryIO, budget: limits.Budget | None = None) -> pickles.Pickle:
        """The tree of values in it, made on a budget of others, or one of its own."""
        data = self.small(file, "data.pkl")
        self._require_little_endian(file)
        return pickles.read(data, f"{self.where}: {self.prefix}data.pkl", self.span_of, budget)

    def _require_little_endian(self, file: BinaryIO) -> None:
        """Raise FileFormatError where a record says that the numbers have another order of bytes, or nothing known."""
        wanted = f"{self.prefix}byteorder"
        # torch finds it by a name in any case.
        found = next(
            (name for name in self.entries if len(name) == len(wanted) and name.lower() == wanted.lower()), None
        )
        if found is None:
            return
        if found != wanted:
            raise FileFormatError(f"{self.where}: the record {found} should be called {wanted}")
        order = self.small(file, "byteorder")
        if order == b"big":
            raise FileFormatError(f"{self.where} was written on a big-endian machine", "load and save it with torch")
        if order != b"little":
            raise FileFormatError(f"{self.where} is damaged: its byteorder is {order[:20]!r}")

    def notes(self) -> tuple[str, ...]:
        """What there is to tell of an archive that states no checksum of its values: damage in it is not noticed."""
        if self.entries[f"{self.prefix}data.pkl"].crc:
            return ()
        return (f"{self.path.name} was written without checksums: damage in it would not be noticed",)

    def record_text(self, file: BinaryIO) -> str | None:
        """The record, or None where it is damaged: the tensors are there without it, and so is its copy."""
        if f"{self.prefix}{records.ZIP_RECORD}" not in self.entries:
            return None
        try:
            return self.small(file, records.ZIP_RECORD).decode()
        except (UnicodeDecodeError, FileFormatError):
            return None

    def span_of(self, storage: str, _dtype: str | None) -> Storage:
        """The bytes of a storage, by its key."""
        return self.bytes_of(f"data/{storage}")

    def bytes_of(self, name: str) -> Storage:
        """The bytes of a record, by its name below the prefix; nothing is read yet."""
        entry = self.entries.get(f"{self.prefix}{name}")
        if entry is None:
            raise FileFormatError(f"{self.where} is damaged: record {self.prefix}{name} is missing")
        return storage_of(entry, self.path, self.identity, self.where)

    def has_any(self, folder: str) -> bool:
        """Whether records lie in a folder below the prefix."""
        return any(name.startswith(f"{self.prefix}{folder}") for name in self.entries)

    def small(self, file: BinaryIO, name: str) -> bytes:
        entry = self.entries[f"{self.prefix}{name}"]
        limits.PICKLE_BYTES.check(entry.nbytes, f"{self.where}: {entry.name}")
        return zip_directory.contents(file, entry, self.where)


def archive_in(
    file: BinaryIO, path: Path, identity: tuple[int, int, int], where: str, start: int, size: int
) -> Archive:
    """The archive that takes `size` bytes of a file from `start`: the whole of it, or a part."""
    entries = zip_directory.read(file, size, where, start=start)
    return Archive(path, identity, where, _prefix(where, entries), entries)


def _prefix(where: str, entries: Mapping[str, Entry]) -> str:
    """The folder in the archive that holds every record of it; torch looks into no other."""
    pickled = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickled:
        raise FileFormatError(f"{where} is a zip file, but none that torch.save wrote: it holds no data.pkl")
    prefix = pickled[0].removesuffix("data.pkl")
    if len(pickled) > 1:
        raise FileFormatError(f"{where} holds {len(pickled)} files named data.pkl: {listed(pickled, 3)}")
    if prefix.count("/") != 1:
        raise FileFormatError(f"{where} holds {pickled[0]}, and torch looks for data.pkl in one folder of the archive")
    if f"{prefix}constants.pkl" in entries:
        raise FileFormatError(f"{where} is a torch.jit archive", "save its state_dict() with torch.save instead")
    if stray := next((name for name in entries if not name.startswith(prefix)), None):
        raise FileFormatError(
            f"{where} holds {stray} beside the folder {prefix}: a second prefix, and torch.save writes one",
            "what another program packed into it has to come out first",
        )
    return prefix
