"""A file as it will be, worked out before a byte of it is written: where each source of bytes goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from modelcli.checkpoints.plan import Source
from modelcli.checkpoints.storage import FileId, Span

#: Offsets in two files that are equal modulo this are copied fastest, and shared where a file system can share blocks.
PAGE = 4096
#: Spans from here on are worth a place that suits them.
LARGE = 256 * 1024


class Output(Protocol):
    """The file that a layout writes into, any part of it at any time."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset."""
        ...

    def put(self, offset: int, source: Source) -> None:
        """Write all bytes of a source at an offset."""
        ...

    def put_with_checksum(self, offset: int, source: Source) -> int:
        """Write all bytes of a source at an offset, and give their CRC-32."""
        ...


class Layout(Protocol):
    """One file as it will be, `nbytes` long."""

    @property
    def nbytes(self) -> int: ...

    def parts(self) -> Iterable[tuple[int, Source]]:
        """Where the bytes of each source will be: what `--verify` reads back and compares."""
        ...

    def write(self, output: Output) -> None:
        """Write the whole file."""
        ...


@dataclass(frozen=True)
class Bytes:
    """A source that is in memory already."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def files(self) -> Iterable[FileId]:
        return ()

    def chunks(self) -> Iterator[bytes]:
        yield self.data


@dataclass(frozen=True)
class BytesLayout:
    """A file that is in memory already."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def parts(self) -> Iterable[tuple[int, Source]]:
        return ((0, Bytes(self.data)),)

    def write(self, output: Output) -> None:
        output.write(0, self.data)


@dataclass(frozen=True)
class CopyLayout:
    """A file that is all bytes of one source: a copy of another file, or text that was just made."""

    source: Source

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def parts(self) -> Iterable[tuple[int, Source]]:
        return ((0, self.source),)

    def write(self, output: Output) -> None:
        output.put(0, self.source)


@dataclass(frozen=True)
class HeaderLayout:
    """A header, and runs of bytes behind it, each at its place."""

    header: bytes
    runs: Sequence[tuple[int, Source]]
    nbytes: int

    def parts(self) -> Iterable[tuple[int, Source]]:
        return ((0, Bytes(self.header)), *self.runs)

    def write(self, output: Output) -> None:
        output.write(0, self.header)
        for offset, source in self.runs:
            output.put(offset, source)


@dataclass(frozen=True)
class FolderLayout:
    """A folder as it will be: its files by name, in the order in which they are written; the index comes last."""

    files: Mapping[str, Layout]

    @property
    def nbytes(self) -> int:
        return sum(layout.nbytes for layout in self.files.values())


def place_like(source: Source, at_least: int, alignment: int) -> int:
    """Where to put a source: on a multiple of `alignment`, and of a large span where its own file has it in a page."""
    if isinstance(source, Span) and source.nbytes >= LARGE and source.offset % alignment == 0:
        return at_least + (source.offset - at_least) % PAGE
    return at_least + -at_least % alignment
