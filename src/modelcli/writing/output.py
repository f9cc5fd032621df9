"""Write the bytes of a plan into an open file. The system copies bytes that come from a file; others are written."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import BinaryIO, Self

from modelcli.checkpoints.layout import LARGE, PAGE
from modelcli.checkpoints.plan import Source
from modelcli.checkpoints.storage import CHUNK, FileId, Span, require_unchanged, spans_of
from modelcli.checkpoints.zip_archives import directory as zip_directory
from modelcli.errors import FileFormatError, SystemFailureError

#: Called with the bytes done, the bytes in total, and the kind of work (`writing`, `verifying`).
Report = Callable[[int, int, str], None]

#: The bytes to copy at a time: whole pages, and few enough for a progress bar to move.
_STEP = 64 * 1024 * 1024
#: The bytes to read at a time for a checksum: so few that they are still in the processor's cache when it is computed.
_PIECE = 1024 * 1024
#: From this size on the checksum is computed in another thread while the system copies the bytes.
_OVERLAPPED = 4 * 1024 * 1024
_OPEN_FILES = 32
#: Pieces of fewer bytes are written together, at most so many of them. As many bytes are read for a small span, because
#: the next one is likely to be behind it.
_SMALL = 64 * 1024
_MOST_KEPT = 10_000
#: The errors after which to read and write instead, because the system cannot copy between these two files. If one of
#: the files is the cause, reading or writing it shows which one.
_CANNOT_COPY = frozenset(
    (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO, errno.ETXTBSY)
)


class Output:
    """A file that is being written, at any offset in any order. `total` is its final size in bytes."""

    def __init__(self, file: BinaryIO, total: int, report: Report | None = None, *, durable: bool = False) -> None:
        self._handle = file.fileno()
        self._durable = durable and hasattr(os, "posix_fadvise")
        self._total = total
        self._done = 0
        self._report = report
        self._sources: dict[FileId, int] = {}
        self._checksums: dict[FileId, dict[tuple[int, int], int]] = {}
        self._files: set[FileId] = set()
        self._copies = hasattr(os, "copy_file_range")
        #: Small pieces that are not written yet, each with its offset, and their bytes altogether.
        self._kept: list[tuple[int, bytes]] = []
        self._kept_bytes = 0
        #: The last block of a source that was read for a small span: its file, its offset, and its bytes.
        self._block: tuple[FileId | None, int, bytes] = (None, 0, b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write_kept()
        finally:
            for handle in self._sources.values():
                os.close(handle)
            self._sources.clear()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset, small pieces with the next ones: an archive may have 200,000 of a few bytes."""
        view = memoryview(data).cast("B")
        if not view:
            return
        if len(view) < _SMALL:
            self._kept.append((offset, bytes(view)))
            self._kept_bytes += len(view)
            if self._kept_bytes >= CHUNK or len(self._kept) >= _MOST_KEPT:
                self._write_kept()
            return
        self._write_now(offset, view)

    def _write_kept(self) -> None:
        """Write the small pieces, those that touch each other at once."""
        pieces = sorted(self._kept)
        self._kept, self._kept_bytes = [], 0
        run: list[bytes] = []
        start = end = 0
        for offset, data in pieces:
            if offset != end:
                self._write_now(start, memoryview(b"".join(run)))
                run, start = [], offset
            run.append(data)
            end = offset + len(data)
        self._write_now(start, memoryview(b"".join(run)))

    def _write_now(self, offset: int, view: memoryview) -> None:
        while view:
            try:
                written = _pwrite(self._handle, view, offset)
            except OSError as error:
                raise self._with_room(error) from None
            view, offset = view[written:], offset + written
            self._advance(written)

    def put(self, offset: int, source: Source) -> None:
        """Write all bytes of a source at an offset. Raises an error if it has fewer bytes than it says."""
        self._files.update(source.files())
        left = source.nbytes
        for piece in spans_of(source):
            if isinstance(piece, Span):
                self._copy(piece, offset)
            else:
                for _ in self._streamed(offset, piece):
                    pass
            offset, left = offset + piece.nbytes, left - piece.nbytes
        if left:
            raise SystemFailureError(f"a source of {source.nbytes:,} bytes gave {source.nbytes - left:,}")

    def put_with_checksum(self, offset: int, source: Source) -> int:
        """Write all bytes of a source at an offset and return their CRC-32.

        For a record of a zip file it is the checksum that the file states, so that the system can copy the bytes.
        """
        self._files.update(source.files())
        if isinstance(source, Span) and (known := self._stated_checksum(source)) is not None:
            self._copy(source, offset)
            return known
        # Without pread, two threads would move the position in the file that both read.
        if isinstance(source, Span) and source.nbytes >= _OVERLAPPED and hasattr(os, "pread"):
            with _Checksum(self._opened(source), source) as checksum_of_source:
                self._copy(source, offset)
                return checksum_of_source.result()
        checksum = 0
        for chunk in self._streamed(offset, source):
            checksum = zlib.crc32(chunk, checksum)
        return checksum

    def require_unchanged_sources(self) -> None:
        """Raise FileFormatError if a file that any source has read was changed or removed meanwhile."""
        for path, identity in sorted(self._files):
            require_unchanged(path, identity)

    def _streamed(self, offset: int, source: Source) -> Iterator[bytes | memoryview]:
        """Write a source piece by piece, and yield each piece, for a checksum."""
        left = source.nbytes
        for chunk in self._read(source) if isinstance(source, Span) else source.chunks():
            self.write(offset, chunk)
            offset, left = offset + len(chunk), left - len(chunk)
            yield chunk
        if left:
            raise SystemFailureError(f"a source of {source.nbytes:,} bytes gave {source.nbytes - left:,}")

    # --- spans of files --------------------------------------------------------------------------------------------

    def _copy(self, span: Span, offset: int) -> None:
        """Copy a span; holes stay holes."""
        if span.nbytes < LARGE:
            for _ in self._streamed(offset, span):
                pass
            return
        source = self._opened(span)
        shift = offset - span.offset
        end = span.offset + span.nbytes
        done = span.offset
        for first, last in _data_in(source, span.offset, end):
            self._advance(first - done)
            for start, stop in _in_pages(first, last, shift):
                self._copy_data(span, source, start, stop, start + shift)
            done = last
        self._advance(end - done)
        if os.fstat(self._handle).st_size < end + shift:
            os.ftruncate(self._handle, end + shift)

    def _copy_data(self, span: Span, source: int, start: int, stop: int, offset: int) -> None:
        """Let the system copy bytes of an open file; if it cannot, read and write them."""
        while self._copies and start < stop:
            try:
                copied = os.copy_file_range(source, self._handle, min(_STEP, stop - start), start, offset)
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise self._with_room(error) from None
                self._copies = False
                break
            if not copied:
                break
            self._send(offset, copied)
            start, offset = start + copied, offset + copied
            self._advance(copied)
        for data in self._read(span.part(start - span.offset, stop - start)):
            self.write(offset, data)
            offset += len(data)

    def _send(self, offset: int, nbytes: int) -> None:
        """Start flushing the copied bytes to the disk, so that the final flush takes less time."""
        if self._durable and nbytes >= LARGE:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._handle, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _read(self, span: Span) -> Iterator[bytes]:
        """Yield the bytes of a span in pieces of at most `_PIECE`."""
        if 0 < span.nbytes < _SMALL // 8 and len(data := self._small(span)) == span.nbytes:
            yield data
            return
        yield from _pieces(self._opened(span), span)

    def _small(self, span: Span) -> bytes:
        """Return the bytes of a small span, from a block of its file; fewer if the system gave fewer than the block."""
        handle, file = self._opened(span), (span.path, span.identity)
        known, start, block = self._block
        if known != file or not start <= span.offset <= start + len(block) - span.nbytes:
            start = span.offset
            try:
                block = _pread(handle, _SMALL, start)
            except OSError as error:
                raise SystemFailureError(f"cannot read {span.path}: {error.strerror or error}") from None
            self._block = (file, start, block)
        return block[span.offset - start : span.offset - start + span.nbytes]

    def _opened(self, span: Span) -> int:
        """Open the file of a span; the last few stay open. Raises FileFormatError if the file has changed."""
        key = (span.path, span.identity)
        if key not in self._sources:
            while len(self._sources) >= _OPEN_FILES:
                os.close(self._sources.pop(next(iter(self._sources))))
            require_unchanged(span.path, span.identity)
            try:
                self._sources[key] = os.open(span.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise SystemFailureError(f"cannot read {span.path}: {error.strerror or error}") from None
            require_unchanged(span.path, span.identity, self._sources[key])
        if span.offset + span.nbytes > span.identity[0]:
            raise FileFormatError(f"{span.path} ends early: it has {span.identity[0]:,} bytes")
        return self._sources[key]

    def _stated_checksum(self, span: Span) -> int | None:
        """Return the CRC-32 that a zip file states for this span, if it is a record. (torch may write 0 for "none".)"""
        key = (span.path, span.identity)
        if key not in self._checksums:
            with span.opened() as file:
                self._checksums[key] = checksums_in(file, str(span.path))
        return self._checksums[key].get((span.offset, span.nbytes)) or None

    def _with_room(self, error: OSError) -> OSError:
        """Return the error; for a full disk, with the size of the whole file and the free space in its message."""
        if error.errno != errno.ENOSPC or not hasattr(os, "fstatvfs"):
            return error
        status = os.fstatvfs(self._handle)
        free = status.f_bavail * status.f_frsize
        return OSError(
            error.errno,
            f"{error.strerror}: the output needs {self._total / 1e6:,.2f} MB, but only {free / 1e6:,.2f} MB are free",
        )

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._report is not None and nbytes:
            self._report(min(self._done, self._total), self._total, "writing")


class _Checksum:
    """Computes the CRC-32 of a span of an open file in a thread, as long as the context is open.

    Both the copy and the checksum read the file, the second of them from the system's cache. `result` waits for the
    checksum and raises FileFormatError or SystemFailureError if the span cannot be read.
    """

    def __init__(self, handle: int, span: Span) -> None:
        self._handle, self._span = handle, span
        self._stopped = False
        self._checksum = 0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._compute, name="checksum", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join()

    def result(self) -> int:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._checksum

    def _compute(self) -> None:
        try:
            for data in _pieces(self._handle, self._span):
                if self._stopped:
                    return
                self._checksum = zlib.crc32(data, self._checksum)
        except Exception as error:
            self._error = error


def _pieces(handle: int, span: Span) -> Iterator[bytes]:
    """Yield the bytes of a span of an open file in pieces of at most `_PIECE`."""
    start, stop = span.offset, span.offset + span.nbytes
    while start < stop:
        try:
            data = _pread(handle, min(_PIECE, stop - start), start)
        except OSError as error:
            raise SystemFailureError(f"cannot read {span.path}: {error.strerror or error}") from None
        if not data:
            raise FileFormatError(f"{span.path} ends early: {stop - start:,} bytes are missing")
        yield data
        start += len(data)


def checksums_in(file: BinaryIO, where: str) -> dict[tuple[int, int], int]:
    """Return the CRC-32 of each record of a zip file, by offset and size; an empty dict for any other file."""
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        return {}
    try:
        entries = zip_directory.read(file, file.seek(0, os.SEEK_END), where)
    except FileFormatError:
        return {}  # an archive inside another file
    return {(entry.offset, entry.nbytes): entry.crc for entry in entries.values() if entry.stored}


def _in_pages(start: int, stop: int, shift: int) -> Iterator[tuple[int, int]]:
    """Split a range at its first and last page boundary, if the boundaries are at the same positions in both files."""
    first, last = start + -start % PAGE, stop - stop % PAGE
    if shift % PAGE or first >= last:
        yield start, stop
        return
    yield from ((a, b) for a, b in ((start, first), (first, last), (last, stop)) if a < b)


def _data_in(handle: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file between two offsets that are not holes; the whole range if the system cannot tell."""
    if not hasattr(os, "SEEK_DATA"):
        yield start, stop
        return
    while start < stop:
        try:
            first = os.lseek(handle, start, os.SEEK_DATA)
            last = os.lseek(handle, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: the rest is a hole
                yield start, stop
            return
        if first >= stop:
            return
        yield first, min(last, stop)
        start = last


def _pwrite(handle: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, data, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.write(handle, data)


def _pread(handle: int, nbytes: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(handle, nbytes, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, nbytes)
