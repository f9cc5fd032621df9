"""The journal of a folder that is being written, by which an interrupted conversion continues with `--resume`.

The journal is a folder in the temporary folder that the shards are written into. It states which work that is, and for
each file that is complete its size and SHA-256: an entry is made once the file is on the disk. `--resume` compares each
file with its entry, so a half-written or altered file is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from modelcli import installed
from modelcli._version import __version__
from modelcli.checkpoints.layout import Bytes, FolderLayout, Layout
from modelcli.checkpoints.storage import CHUNK, FileId
from modelcli.errors import ModelcliError, SystemFailureError
from modelcli.files.open_folder import NO_SURPRISES, sync_folder

#: The name of the journal in a temporary folder.
NAME = ".modelcli-journal"
_WORK = "work.json"
#: The largest size of a file of the journal, in bytes.
_MAX_BYTES = 100_000_000


#: Called with the bytes of a file that were read so far: the one who reads it gets on.
Read = Callable[[int], None]


class Watch(Protocol):
    """Remembers whether a value was met that the user hears of."""

    seen: bool


@dataclass(frozen=True)
class Resume:
    """The command's own part of an interrupted run.

    Attributes:
        text: what decides the bytes of the result besides its plan: the model, the edits and options.
        watches: returns what has recorded values for notes, in the same order in each run of the same work. What an
            interrupted run has seen in a file counts as seen once the file is taken over.
    """

    text: str
    watches: Callable[[], Sequence[Watch]] = tuple


@dataclass(frozen=True)
class Work:
    """What is written, as far as it decides the bytes of each file.

    Attributes:
        digest: the digest of all of it: two runs with the same digest write the same bytes.
        sources: the files that the bytes of each file come from, for files that come from other files alone. Others,
            such as those with random values, are not taken over from an interrupted run.
    """

    digest: str
    sources: Mapping[str, frozenset[FileId]]


def work_of(folder: FolderLayout, request: str) -> Work:
    """Describe what is written.

    Args:
        folder: the layout of the folder.
        request: the text of the command's own part: see `Resume`.
    """
    digest = hashlib.sha256()
    for text in (__version__, installed.version("torch") or "", installed.version("numpy") or "", request):
        digest.update(f"{len(text)} {text}".encode())
    sources = {}
    for name, layout in folder.files.items():
        digest.update(repr((name, layout.nbytes)).encode())
        files: set[FileId] = set()
        is_of_files = True
        for offset, source in layout.parts():
            own = [(os.path.realpath(path), identity) for path, identity in source.files()]
            digest.update(repr((offset, source.nbytes, type(source).__name__, own)).encode())
            if isinstance(source, Bytes):
                digest.update(hashlib.sha256(source.data).digest())
            is_of_files = is_of_files and (isinstance(source, Bytes) or bool(own))
            files.update(source.files())
        if is_of_files:
            sources[name] = frozenset(files)
    return Work(digest.hexdigest(), sources)


def is_of(folder: Path, work: Work) -> bool:
    """Whether a temporary folder has the journal of this work."""
    return _read(folder / NAME / _WORK).get("work") == work.digest


def complete_in(folder: Path) -> int:
    """Return the number of files in a temporary folder that its journal calls complete."""
    book = folder / NAME
    names = [path.name for path in book.iterdir()] if book.is_dir() else []
    return sum(name.endswith(".json") and name != _WORK for name in names)


class Journal:
    """The journal in a temporary folder. Several processes may add files to it at once."""

    def __init__(self, folder: Path, work: Work, resume: Resume) -> None:
        self._folder = folder
        self._work = work
        self._resume = resume

    @cached_property
    def _watches(self) -> Sequence[Watch]:
        return self._resume.watches()

    def start(self, names: Iterable[str]) -> None:
        """Begin the journal, or go on with it: remove from the folder all but the files of these names."""
        kept = {NAME, *names}
        for entry in list(self._folder.iterdir()):
            is_folder = entry.is_dir() and not entry.is_symlink()
            if entry.name in kept and (is_folder if entry.name == NAME else stat.S_ISREG(entry.lstat().st_mode)):
                continue
            if is_folder:
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (self._folder / NAME).mkdir(mode=0o700, exist_ok=True)
        self._write(_WORK, {"work": self._work.digest})
        sync_folder(self._folder)

    def has(self, name: str, layout: Layout, read: Read = lambda _nbytes: None) -> bool:
        """Whether a file is complete and as its entry states. A file that is not is removed, to be written again.

        Args:
            name: the name of the file.
            layout: what it should contain.
            read: told of the bytes that were read, all of which the SHA-256 is of.
        """
        path = self._folder / name
        stated = _read(self._folder / NAME / _entry_of(name))
        try:
            handle = os.open(path, os.O_RDONLY | NO_SURPRISES)
        except FileNotFoundError:
            return False
        with os.fdopen(handle, "rb", buffering=0) as file:
            is_whole = (
                name in self._work.sources
                and (stated.get("name"), stated.get("nbytes")) == (name, layout.nbytes)
                and os.fstat(file.fileno()).st_size == layout.nbytes
                and stated.get("sha256") == _digest_of(file, read)
            )
        if not is_whole:
            path.unlink()
            return False
        for number in stated["seen"]:
            self._watches[number].seen = True
        return True

    def add(self, name: str, file: BinaryIO, read: Read = lambda _nbytes: None) -> None:
        """Enter a file that was written: its bytes go to the disk, and then its entry does.

        Args:
            name: the name of the file.
            file: the file, open for reading.
            read: told of the bytes that were read, all of which the SHA-256 is of.
        """
        os.fsync(file.fileno())
        sync_folder(self._folder)
        file.seek(0)
        nbytes = os.fstat(file.fileno()).st_size
        seen = [number for number, watch in enumerate(self._watches) if watch.seen]
        self._write(_entry_of(name), {"name": name, "nbytes": nbytes, "sha256": _digest_of(file, read), "seen": seen})

    def remove(self) -> None:
        """Remove the journal: the folder is complete."""
        shutil.rmtree(self._folder / NAME)

    def _write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a file of the journal in one step."""
        folder = self._folder / NAME
        new = folder / f"{name}.new"
        with new.open("wb") as file:
            file.write(json.dumps(document).encode())
            file.flush()
            os.fsync(file.fileno())
        new.replace(folder / name)
        sync_folder(folder)


def is_kept_after(error: BaseException) -> bool:
    """Whether what was written is kept after an error: the same command could succeed later."""
    return isinstance(error, SystemFailureError) or not isinstance(error, ModelcliError)


def _entry_of(name: str) -> str:
    """Return the name of a file's entry, for which any name of the file is good."""
    return f"{hashlib.sha256(os.fsencode(name)).hexdigest()}.json"


def _read(path: Path) -> Mapping[str, Any]:
    """Return a file of the journal; an empty dict for one that is missing or half-written."""
    try:
        handle = os.open(path, os.O_RDONLY | NO_SURPRISES)
        with os.fdopen(handle, "rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest_of(file: BinaryIO, read: Read) -> str:
    made, done = hashlib.sha256(), 0
    while data := file.read(CHUNK):
        made.update(data)
        done += len(data)
        read(done)
    return made.hexdigest()
