"""The bytes of tensors as spans of files, which are read or mapped when they are needed."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.model.tensors import value_class

CHUNK = 8 * 1024 * 1024
#: Spans of up to this size are read rather than mapped: statistics, conversions and comparisons use smaller pieces.
MAX_READ = 64 * 1024 * 1024

#: The size, modification time and inode of a file, which show whether it is still the same.
Identity = tuple[int, int, int]
FileId = tuple[Path, Identity]


class Windows:
    """Memory mappings of long pieces of files, each shared by all tensors of one load.

    A mapping keeps its file open, and a process may usually have no more than 1,024 files open.

    Args:
        length: the bytes from the start of one window to the next. A span that crosses windows gets its own mapping.
        most: the number of windows to keep; the oldest is dropped first. None keeps all.
    """

    def __init__(self, length: int = 1 << 30, *, most: int | None = None) -> None:
        self.length = length
        self.most = most
        self._found: dict[tuple[Path, Identity, int], mmap.mmap] = {}

    def view(self, span: Span) -> memoryview:
        """Return the bytes of a span as private, writable memory that no other load shares."""
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
    """The bytes that tensors are views of, wherever these are. Equal storages count as the same storage."""

    @property
    def nbytes(self) -> int: ...

    def files(self) -> Iterable[FileId]:
        """The files that the bytes are read from, with the identities that they had when the storage was found."""
        ...

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes in pieces of at most 8 MiB. Raises FileFormatError if they are not as expected."""
        ...

    def bytes(self) -> bytes: ...

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """Return the bytes as writable memory: mapped if they are many and contiguous in a file, else read.

        With `windows` the memory is a part of one of these mappings.
        """
        ...

    def part(self, start: int, nbytes: int) -> Storage:
        """Return the `nbytes` bytes from `start` as a storage."""
        ...

    def __hash__(self) -> int: ...


@value_class
class Span:
    """The `nbytes` bytes of a file from `offset`. `identity` is the identity of the file when the span was found."""

    path: Path = field(hash=False)  # to hash one takes longer than all the rest, and the identity tells files apart
    offset: int
    nbytes: int
    identity: Identity

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the file. Raises FileFormatError if it has changed, SystemFailureError if it cannot be read."""
        require_unchanged(self.path, self.identity)
        try:
            with self.path.open("rb") as file:
                yield file
        except OSError as error:
            raise SystemFailureError(f"cannot read {self.path}: {error.strerror or error}") from None

    def files(self) -> Iterable[FileId]:
        return ((self.path, self.identity),)

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in pieces of at most 8 MiB. Raises FileFormatError if the file has changed."""
        with self.opened() as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                data = file.read(min(CHUNK, left))
                if not data:
                    raise _ends_early(self.path, left)
                left -= len(data)
                yield data

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """Return the bytes as private, writable memory. More than `MAX_READ` bytes are mapped rather than read."""
        if not self.nbytes:
            return memoryview(bytearray())
        if windows is not None:
            return windows.view(self)
        if self.nbytes <= MAX_READ:
            found = memoryview(bytearray(self.nbytes))
            self.read_into(found)
            return found
        return self.mapping()

    def read_into(self, memory: memoryview) -> None:
        """Read the bytes into memory of the same size. Raises FileFormatError if the file has fewer bytes by now."""
        with self.opened() as file:
            file.seek(self.offset)
            done = 0
            while done < self.nbytes:
                count = file.readinto(memory[done:])  # type: ignore[attr-defined]
                if not count:
                    raise _ends_early(self.path, self.nbytes - done)
                done += count

    def mapping(self) -> memoryview:
        """Return the bytes as a private, writable mapping. The file must not be shortened while the mapping is used."""
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        length = self.offset - start + self.nbytes
        with self.opened() as file:
            mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        return memoryview(mapping)[self.offset - start :]

    def part(self, start: int, nbytes: int) -> Span:
        return Span(self.path, self.offset + start, nbytes, self.identity)


def _ends_early(path: Path, missing: int) -> FileFormatError:
    return FileFormatError(
        f"{path} ends early: {missing:,} bytes are missing",
        "another program may have shortened it: run the command again",
    )


def is_in_sequence(storage: Storage) -> bool:
    """Whether the bytes can only be read from the start (they are compressed), so that a part costs as much as all."""
    return bool(getattr(storage, "in_sequence", False))


def spans_of(source: Any) -> Iterator[Any]:
    """Yield the sources whose bytes in a row are those of a source: spans of files, as far as it consists of such.

    A source that consists of others has a method `pieces`, which yields them.
    """
    pieces = getattr(source, "pieces", None)
    if pieces is None:
        yield source
        return
    for piece in pieces():
        yield from spans_of(piece)


def gathered(storage: Storage) -> memoryview:
    """Return the bytes of a storage that is not contiguous in a file, copied into new memory."""
    made, end = memoryview(bytearray(storage.nbytes)), 0
    for chunk in storage.chunks():
        made[end : end + len(chunk)] = chunk
        end += len(chunk)
    return made


@dataclass(frozen=True, slots=True)
class JoinedSpan:
    """Several storages one after another, such as the rows of a tensor that several ranks wrote."""

    parts: tuple[Storage, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def in_sequence(self) -> bool:
        return any(map(is_in_sequence, self.parts))

    def files(self) -> Iterable[FileId]:
        return {file for part in self.parts for file in part.files()}

    def pieces(self) -> Iterable[Storage]:
        return self.parts

    def chunks(self) -> Iterator[bytes | memoryview]:
        for part in self.parts:
            yield from part.chunks()

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """Return the bytes in new memory, because separate parts cannot be mapped together."""
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
    """Return the identity of a file, given its path or open handle. Raises OSError if there is no such file."""
    status = os.fstat(file) if isinstance(file, int) else file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def require_unchanged(path: Path, identity: Identity, handle: int | None = None) -> None:
    """Raise FileFormatError if a file, or its open handle, has changed since its identity was taken, or is gone."""
    try:
        if identity_of(path if handle is None else handle) == identity:
            return
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    raise FileFormatError(f"{path} changed while it was being read", "run the command again")
