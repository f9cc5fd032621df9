"""The layout of a file, computed before it is written: the offset of each source of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from modelcli.checkpoints.plan import Source
from modelcli.checkpoints.storage import FileId, Span
from modelcli.wording import counted

#: Copying is fastest if the offsets in both files are equal modulo this. Some file systems can then share the blocks.
PAGE = 4096
#: Spans of at least this size are placed so that they can be copied fast.
LARGE = 256 * 1024


class Output(Protocol):
    """The file that a layout writes, at any offset in any order."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset."""
        ...

    def put(self, offset: int, source: Source) -> None:
        """Write all bytes of a source at an offset."""
        ...

    def put_with_checksum(self, offset: int, source: Source) -> int:
        """Write all bytes of a source at an offset, and return their CRC-32."""
        ...


class Layout(Protocol):
    """The layout of one file of `nbytes` bytes."""

    @property
    def nbytes(self) -> int: ...

    def parts(self) -> Iterable[tuple[int, Source]]:
        """Return the offset of each source. `--verify` reads these bytes back and compares them."""
        ...

    def write(self, output: Output) -> None:
        """Write the whole file."""
        ...


@dataclass(frozen=True)
class Bytes:
    """A source in memory."""

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
    """The layout of a file whose content is in memory."""

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
    """The layout of a file with a header, and after it runs of bytes, each with its offset."""

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
    """The layout of a folder: its files by name in the order of writing, the index last; and notes for the user."""

    files: Mapping[str, Layout]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(layout.nbytes for layout in self.files.values())


def place_like(source: Source, at_least: int, alignment: int) -> int:
    """Return the offset for a source: a multiple of `alignment`, and for a large span one that copies fast.

    Args:
        source: the source.
        at_least: the first free offset.
        alignment: the alignment in bytes.
    """
    if isinstance(source, Span) and source.nbytes >= LARGE and source.offset % alignment == 0:
        return at_least + (source.offset - at_least) % PAGE
    return at_least + -at_least % alignment


def notes_on_larger(sizes: Mapping[str, int], max_bytes: int) -> tuple[str, ...]:
    """Return a note if tensors are larger than a file of a folder should be: each has a file of its own.

    Args:
        sizes: the bytes of each tensor by its name.
        max_bytes: the most bytes of tensors in a file.
    """
    larger = [name for name, nbytes in sizes.items() if nbytes > max_bytes]
    if not larger:
        return ()
    name = max(larger, key=sizes.__getitem__)
    others = len(larger) - 1
    more = f"; so {'has' if others == 1 else 'have'} {counted(others, 'other tensor')}" if others else ""
    return (f"{name} has {sizes[name]:,} bytes, more than the {max_bytes:,} of a shard, and a file of its own{more}",)
