"""Where the bytes of tensors lie: spans of files, read or mapped when they are asked for."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.model.tensors import value_class

CHUNK = 8 * 1024 * 1024
#: So much is read rather than mapped: statistics, conversions and comparisons work on no larger pieces.
MOST_READ = 64 * 1024 * 1024

#: A file's size, time of its last change, and inode: what tells that it is still the same.
Identity = tuple[int, int, int]
FileId = tuple[Path, Identity]


class Windows:
    """Long pieces of files, mapped once for all tensors of one load: a mapping holds its file open, and a process may
    have no more than 1,024 files open.

    `length` is how many bytes it is from the start of one window to the next; what does not fit into one is mapped by
    itself. Of more windows than `most` the oldest are let go.
    """

    def __init__(self, length: int = 1 << 30, *, most: int | None = None) -> None:
        self.length = length
        self.most = most
        self._found: dict[tuple[Path, Identity, int], mmap.mmap] = {}

    def view(self, span: Span) -> memoryview:
        """The bytes of a span as private, writable memory that no other load shares."""
        number, start = divmod(span.offset, self.length)
        if span.nbytes > self.length - start:
            return span.mapping()
        key = (span.path, span.identity, number)
        if key not in self._found:
            if len(self._found) == self.most:
                self._found.pop(next(iter(self._found)))
            first = number * self.length
            with span.opened() as file:
                length = min(self.length, span.identity[0] - first)
                self._found[key] = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=first)
        return memoryview(self._found[key])[start : start + span.nbytes]


class Storage(Protocol):
    """The bytes that tensors are views into, wherever they lie. Equal storages are one."""

    @property
    def nbytes(self) -> int: ...

    def files(self) -> Iterable[FileId]:
        """The files that the bytes are read from, as they were when it was found out where in them they lie."""
        ...

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes, in pieces of at most 8 MiB. Raises FileFormatError where they are not what was promised."""
        ...

    def bytes(self) -> bytes: ...

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """The bytes as writable memory of its own: read, or mapped where they are many and lie in one piece.

        With `windows` they are a part of one of those.
        """
        ...

    def part(self, start: int, nbytes: int) -> Storage:
        """`nbytes` of the bytes, from `start`."""
        ...

    def __hash__(self) -> int: ...


@value_class
class Span:
    """`nbytes` bytes of a file, from `offset`. `identity` is the file's (size, mtime, inode) when it was read."""

    path: Path
    offset: int
    nbytes: int
    identity: Identity

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file. Raises FileFormatError where it is no longer the same, SystemFailureError where reading fails."""
        require_unchanged(self.path, self.identity)
        try:
            with self.path.open("rb") as file:
                yield file
        except OSError as error:
            raise SystemFailureError(f"cannot read {self.path}: {error.strerror or error}") from None

    def files(self) -> Iterable[FileId]:
        return ((self.path, self.identity),)

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in pieces of at most 8 MiB. Raises FileFormatError where the file is no longer the same."""
        with self.opened() as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                data = file.read(min(CHUNK, left))
                if not data:
                    raise FileFormatError(f"{self.path} ends early: {left} bytes are missing")
                left -= len(data)
                yield data

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """The bytes as private, writable memory: read, or beyond `MOST_READ` a mapping, whose pages are read when they
        are used, and which keeps what is written to itself."""
        if not self.nbytes:
            return memoryview(bytearray())
        if windows is not None:
            return windows.view(self)
        if self.nbytes <= MOST_READ:
            found = memoryview(bytearray(self.nbytes))
            self.read_into(found)
            return found
        return self.mapping()

    def read_into(self, memory: memoryview) -> None:
        """Read the bytes into memory of this size. Raises FileFormatError where the file has fewer by now."""
        with self.opened() as file:
            file.seek(self.offset)
            done = 0
            while done < self.nbytes:
                count = file.readinto(memory[done:])  # type: ignore[attr-defined]
                if not count:
                    raise FileFormatError(
                        f"{self.path} ends early: {self.nbytes - done:,} bytes are missing", "run the command again"
                    )
                done += count

    def mapping(self) -> memoryview:
        """The bytes as a private, writable mapping. The file must not be cut short while it is in use."""
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        length = self.offset - start + self.nbytes
        with self.opened() as file:
            mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        return memoryview(mapping)[self.offset - start :]

    def part(self, start: int, nbytes: int) -> Span:
        return Span(self.path, self.offset + start, nbytes, self.identity)


def is_in_sequence(storage: Storage) -> bool:
    """Whether the bytes come one after another alone (they are compressed): a part costs what all before it costs."""
    return bool(getattr(storage, "in_sequence", False))


def gathered(storage: Storage) -> memoryview:
    """The bytes of a storage that does not lie in one piece, put together in memory of their own."""
    made, end = memoryview(bytearray(storage.nbytes)), 0
    for chunk in storage.chunks():
        made[end : end + len(chunk)] = chunk
        end += len(chunk)
    return made


@dataclass(frozen=True, slots=True)
class JoinedSpan:
    """Storages one after another, as the ranks of a sharded tensor wrote its rows."""

    parts: tuple[Storage, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def in_sequence(self) -> bool:
        return any(map(is_in_sequence, self.parts))

    def files(self) -> Iterable[FileId]:
        return {file for part in self.parts for file in part.files()}

    def chunks(self) -> Iterator[bytes | memoryview]:
        for part in self.parts:
            yield from part.chunks()

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """The bytes in memory of their own: what lies apart cannot be mapped as one."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> JoinedSpan:
        found, before = [], 0
        for part in self.parts:
            first, last = max(start - before, 0), min(start + nbytes - before, part.nbytes)
            if first < last:
                found.append(part.part(first, last - first))
            before += part.nbytes
        return JoinedSpan(tuple(found))


def identity_of(file: Path | int) -> Identity:
    """Of a file by its path or its open handle. Raises OSError where it is not there."""
    status = os.fstat(file) if isinstance(file, int) else file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def require_unchanged(path: Path, identity: Identity, handle: int | None = None) -> None:
    """Raise FileFormatError where a file, or what is open of it, is not the one that was read before, or is gone."""
    try:
        if identity_of(path if handle is None else handle) == identity:
            return
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    raise FileFormatError(f"{path} changed while it was being read", "run the command again")
