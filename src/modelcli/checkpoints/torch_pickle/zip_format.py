"""Read the format of `torch.save` since 1.6: a zip archive with a pickle and a record for each storage."""

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
from modelcli.checkpoints.zip_archives.directory import Entry, storage_of
from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.wording import listed


def read(candidate: Candidate, key: str | None) -> Contents:
    """Read the directory, the pickle and modelcli's record of a torch zip file. The bytes of tensors are not read."""
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
    """Return the archive that a file consists of. Raises FileFormatError if torch.save does not write such archives."""
    where = str(candidate.path)
    entries = candidate.records
    return Archive(candidate.path, candidate.identity, where, _prefix(where, entries), entries)


@dataclass(frozen=True)
class Archive:
    """An archive that `torch.save` wrote. All records are under one `prefix`; `where` names the archive in messages."""

    path: Path
    identity: tuple[int, int, int]
    where: str
    prefix: str
    entries: Mapping[str, Entry]

    def pickled(self, file: BinaryIO, budget: limits.Budget | None = None) -> pickles.Pickle:
        """Return the pickle of its values, with a shared budget or a new one."""
        data = self.small(file, "data.pkl")
        self._require_little_endian(file)
        return pickles.read(data, f"{self.where}: {self.prefix}data.pkl", self.span_of, budget)

    def _require_little_endian(self, file: BinaryIO) -> None:
        """Raise FileFormatError if the archive states a byte order other than little-endian."""
        wanted = f"{self.prefix}byteorder"
        # torch ignores the case of the name.
        found = next(
            (name for name in self.entries if len(name) == len(wanted) and name.lower() == wanted.lower()), None
        )
        if found is None:
            return
        if found != wanted:
            raise FileFormatError.damaged(self.where, f"the record {found} should have the name {wanted}")
        order = self.small(file, "byteorder")
        if order == b"big":
            raise FileFormatError(
                f"{self.where} has big-endian values, but modelcli reads little-endian ones",
                "load it with torch, and save it again with torch.save",
            )
        if order != b"little":
            raise FileFormatError.damaged(self.where, f"its byteorder is {order[:20]!r}, not b'little' or b'big'")

    def notes(self) -> tuple[str, ...]:
        """Return the note about an archive without checksums."""
        if self.entries[f"{self.prefix}data.pkl"].crc:
            return ()
        return (f"{self.path.name} has no checksums, so damage in it would not be noticed",)

    def record_text(self, file: BinaryIO) -> str | None:
        """Return modelcli's record; None if it is missing or damaged. The pickle has a copy of it."""
        if f"{self.prefix}{records.ZIP_RECORD}" not in self.entries:
            return None
        try:
            return self.small(file, records.ZIP_RECORD).decode()
        except (UnicodeDecodeError, FileFormatError):
            return None

    def span_of(self, storage: str, _dtype: str | None) -> Storage:
        """Return the bytes of a storage by its key."""
        return self.bytes_of(f"data/{storage}")

    def bytes_of(self, name: str) -> Storage:
        """Return the bytes of a record by its name below the prefix. Nothing is read yet."""
        entry = self.entries.get(f"{self.prefix}{name}")
        if entry is None:
            raise FileFormatError.damaged(self.where, f"the record {self.prefix}{name} is missing")
        return storage_of(entry, self.path, self.identity, self.where)

    def has_any(self, folder: str) -> bool:
        """Whether there are records in a folder below the prefix."""
        return any(name.startswith(f"{self.prefix}{folder}") for name in self.entries)

    def small(self, file: BinaryIO, name: str) -> bytes:
        entry = self.entries[f"{self.prefix}{name}"]
        limits.PICKLE_BYTES.check(entry.nbytes, f"{self.where}: {entry.name}")
        return zip_directory.contents(file, entry, self.where)


def archive_in(
    file: BinaryIO, path: Path, identity: tuple[int, int, int], where: str, start: int, size: int
) -> Archive:
    """Return the archive in the `size` bytes of a file from `start`, which may be only a part of the file."""
    entries = zip_directory.read(file, size, where, start=start)
    return Archive(path, identity, where, _prefix(where, entries), entries)


def _prefix(where: str, entries: Mapping[str, Entry]) -> str:
    """Return the folder that contains all records of the archive; torch reads no others."""
    pickled = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickled:
        raise FileFormatError(f"{where} is a zip file that torch.save did not write: it contains no data.pkl")
    prefix = pickled[0].removesuffix("data.pkl")
    if len(pickled) > 1:
        raise FileFormatError(
            f"{where} contains {len(pickled)} files named data.pkl, and torch.save writes one: {listed(pickled, 3)}"
        )
    if prefix.count("/") != 1:
        raise FileFormatError(
            f"{where} contains {pickled[0]}, but torch reads data.pkl only directly inside one folder of the archive"
        )
    if f"{prefix}constants.pkl" in entries:
        raise FileFormatError(
            f"{where} is a TorchScript archive inside another file", "save its state_dict() with torch.save instead"
        )
    if stray := next((name for name in entries if not name.startswith(prefix)), None):
        raise FileFormatError(
            f"{where} contains {stray} outside the folder {prefix}, but torch.save writes everything into one folder",
            "remove what another program has added to the archive",
        )
    return prefix
