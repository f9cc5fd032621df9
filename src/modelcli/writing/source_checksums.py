"""Compare the files that a checkpoint is made of with the checksums stated of them, before anything is written.

A checksum is stated by `NAME.sha256` or a list such as `SHA256SUMS` beside a file or in the folder above, by the cache
of huggingface_hub (the name of a blob, and the metadata of `hf download --local-dir`), and by a zip file, which has one
for each record.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from modelcli.checkpoints.storage import CHUNK, FileId, require_unchanged
from modelcli.checkpoints.zip_archives import directory as zip_directory
from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.files.checksum_lists import ENDS, is_list
from modelcli.files.open_folder import read_regular
from modelcli.providers import hub_checksums
from modelcli.ranks import ALONE, Group
from modelcli.ranks.sharing import in_runs
from modelcli.wording import counted, listed

#: Called with the bytes done, the bytes in total, and the kind of work.
Report = Callable[[int, int, str], None]

#: The largest size of a list in bytes: 100,000 files.
_MAX_BYTES = 10_000_000
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64})[ \t]+\*?(?:\./)?(.+)")
_BSD_LINE = re.compile(r"SHA256 \((?:\./)?(.+)\) = ([0-9a-fA-F]{64})")
_OWN = "the .sha256 files beside them"
_ZIP = "the CRCs of zip records"


@dataclass(frozen=True)
class _Stated:
    """A SHA-256 that is stated of a file, and where. `kind` is what a note calls all such places; "" for `where`."""

    digest: str
    where: str
    kind: str = ""


@dataclass(frozen=True)
class _Line:
    """A line of a list of checksums: the path of a file as it is spelt there, its SHA-256, and the list."""

    file: str
    digest: str
    source: Path

    def is_of(self, path: Path) -> bool:
        """Whether the line is of a file. Its path is relative to the folder of the list.

        A list may have been made in a folder above, and moved: `q/model.safetensors` in `q/SHA256SUMS`. So a path that
        is not there is looked for from the folders above.

        Args:
            path: the file, as an absolute path.
        """
        folder, name = _absolute(self.source.parent), _name_in(self.file)
        if name != self.file:
            for above in (folder, *folder.parents):
                if os.path.isfile(found := _absolute(above / self.file)):  # noqa: PTH113 (a name may be too long)
                    return found == path
            if self.source.stem != name:
                return False  # else NAME.sha256, which is of the file beside it, wherever it was made
        return folder / name == path


@dataclass
class _Lists:
    """What the lists in each folder state, by the name of a file without its folder. Each is read once."""

    _found: dict[Path, dict[str, list[_Line]]] = field(default_factory=dict)

    def of(self, path: Path) -> list[_Stated]:
        """Return what is stated of a file by the lists beside it, and by those in the folder above."""
        folder, absolute = path.parent, _absolute(path)
        stated = []
        for there in (folder, _above(folder)):
            for line in self._in(there, is_beside=there == folder).get(path.name, ()):
                if line.is_of(absolute):
                    is_own = there == folder and line.source.name.lower().endswith(ENDS)
                    stated.append(_Stated(line.digest, str(line.source), _OWN if is_own else ""))
        return stated

    def _in(self, folder: Path, *, is_beside: bool) -> dict[str, list[_Line]]:
        if folder not in self._found:
            try:
                self._found[folder] = _read_lists(folder)
            except OSError:
                if is_beside:
                    raise
                self._found[folder] = {}  # a home may be in a folder that its user cannot list
        return self._found[folder]


def _absolute(path: Path) -> Path:
    """Return the absolute path. No link is followed."""
    return Path(os.path.normpath(path.absolute()))


def _name_in(file: str) -> str:
    """Return the name in a path of a list: they are those of POSIX."""
    return file.rpartition("/")[2]


def _above(folder: Path) -> Path:
    """Return the folder above one, spelt as that is."""
    return folder.parent if folder.name not in ("", "..") else folder / ".."


def check(files: Iterable[FileId], report: Report | None = None, group: Group = ALONE) -> list[str]:
    """Compare files with their checksums, as far as there are any.

    Args:
        files: the files, and the identities that they had when they were opened.
        report: called with the bytes that were read so far.
        group: the ranks that share the files out. All of them have the same files.

    Returns:
        Notes: what was compared with what, and of which files nothing states a checksum.

    Raises:
        FileFormatError: a file differs from its checksum, or has changed.
        SystemFailureError: a file cannot be read.
    """
    found = sorted(set(files))
    ranks = in_runs([identity[0] for _, identity in found], group.size)
    own = [file for file, rank in zip(found, ranks, strict=True) if rank == group.rank]
    by_rank = group.exchange("checksums", json.dumps(_compared(own, report)).encode())
    by_file = [by for data in by_rank for by in json.loads(data)]
    unstated = [str(path) for (path, _), by in zip(found, by_file, strict=True) if not by]
    return _notes(len(found), unstated, list(dict.fromkeys(each for by in by_file for each in by)))


def _compared(files: Iterable[FileId], report: Report | None) -> list[list[str]]:
    """Compare files with their checksums; return for each where they are stated."""
    lists, found = _Lists(), list(files)
    total, done = sum(identity[0] for _, identity in found), 0
    compared: list[list[str]] = []
    for path, identity in found:
        require_unchanged(path, identity)

        def read(nbytes: int, before: int = done) -> None:
            if report is not None:
                report(before + nbytes, total, "checking")

        try:
            with path.open("rb") as file:
                if stated := _stated_of(path, lists):
                    _require_digest(path, file, stated, read)
                    compared.append([each.kind or each.where for each in stated])
                else:
                    compared.append([_ZIP] if _match_records(path, file, read) else [])
        except OSError as error:
            raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
        require_unchanged(path, identity)
        done += identity[0]
    return compared


def _notes(count: int, unstated: Collection[str], by: Collection[str]) -> list[str]:
    notes = []
    if matching := count - len(unstated):
        files = counted(count, "source file")
        which = files if not unstated else f"{matching} of {files}"
        notes.append(f"{which} {'matches' if matching == 1 else 'match'} {listed([*by], 3)}")
    if unstated:
        notes.append(
            f"nothing states a checksum of {listed([*unstated], 3)}: what was written was compared with what was read"
        )
    return notes


def _require_digest(path: Path, file: BinaryIO, stated: Collection[_Stated], read: Callable[[int], None]) -> None:
    made, done = hashlib.sha256(), 0
    while data := file.read(CHUNK):
        made.update(data)
        done += len(data)
        read(done)
    for each in stated:
        if each.digest != made.hexdigest():
            raise FileFormatError(
                f"{path} is damaged or another file: its SHA-256 is {made.hexdigest()}, and {each.where} states "
                f"{each.digest}",
                "copy or download it again; nothing was written",
            )


def _match_records(path: Path, file: BinaryIO, read: Callable[[int], None]) -> bool:
    """Whether a file is a zip file whose records have checksums. Raises FileFormatError for a record that differs."""
    if file.read(4) != b"PK\x03\x04":
        return False
    try:
        entries = zip_directory.read(file, file.seek(0, os.SEEK_END), str(path))
    except FileFormatError:  # archives one behind another, as in a folder of torch.distributed.checkpoint
        return False
    stored = [(name, entry) for name, entry in entries.items() if entry.stored and entry.nbytes]
    if not all(entry.crc for _, entry in stored):  # torch.save writes 0 if it is told not to compute them
        return False
    done = 0
    for name, entry in stored:
        file.seek(entry.offset)
        crc, left = 0, entry.nbytes
        while left and (data := file.read(min(CHUNK, left))):
            crc = zlib.crc32(data, crc)
            left -= len(data)
            done += len(data)
            read(done)
        if left or crc != entry.crc:
            raise FileFormatError(
                f"{path} is damaged: its record {name} does not match its checksum, as python -m zipfile -t shows",
                "copy or download it again; nothing was written",
            )
    return len(stored) == len([entry for entry in entries.values() if entry.nbytes])


# --- where checksums are stated --------------------------------------------------------------------------------------


def _stated_of(path: Path, lists: _Lists) -> list[_Stated]:
    return [*lists.of(path), *(_Stated(digest, where) for digest, where in hub_checksums.of(path))]


def _read_lists(folder: Path) -> dict[str, list[_Line]]:
    """Read the lists of checksums in a folder; lines that are none are left out.

    Raises FileFormatError for a list that is too large, and OSError for one that cannot be read.
    """
    found: dict[str, list[_Line]] = {}
    for path in sorted(folder.iterdir()):
        if not is_list(path.name) or not path.is_file():
            continue
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise FileFormatError(f"{path} has {size:,} bytes; a list of checksums has at most {_MAX_BYTES:,}")
        text = bytes(read_regular(path)).decode("utf-8", "surrogateescape")
        for line in text.splitlines():
            for file, digest in _read_line(line, path):
                found.setdefault(_name_in(file), []).append(_Line(file, digest.lower(), path))
    return found


def _read_line(line: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the digest in a line as `sha256sum`, `sha256sum --tag` and others write it."""
    line = line.strip()
    if re.fullmatch(r"[0-9a-fA-F]{64}", line) and path.name.lower().endswith(ENDS):
        yield path.stem, line
    elif match := _BSD_LINE.fullmatch(line):
        yield match[1], match[2]
    elif match := _LINE.fullmatch(line):
        name = match[3]
        if match[1]:
            name = re.sub(r"\\(.)", lambda escaped: {"n": "\n", "r": "\r"}.get(escaped[1], escaped[1]), name)
        yield name, match[2]
