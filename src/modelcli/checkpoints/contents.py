"""What was read from a checkpoint, as plain data."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

from modelcli.checkpoints import limits
from modelcli.checkpoints.record import Record
from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.model.blueprint import Blueprint, from_keys
from modelcli.model.tensors import Kind, Shape, TensorInfo, value_class
from modelcli.wording import listed

CHUNK = 8 * 1024 * 1024
#: So much is read rather than mapped: statistics, conversions and comparisons work on no larger pieces.
MOST_READ = 64 * 1024 * 1024
#: A layer of one tensor in a module of its own, as adapters have them, comes to three.
_MODULES_OF_A_TENSOR = 4


#: A file's size, time of its last change, and inode: what tells that it is still the same.
Identity = tuple[int, int, int]
FileId = tuple[Path, Identity]


class Windows:
    """Long pieces of files, mapped once for all tensors of one load: a mapping holds its file open, and a process may
    have no more than 1,024 files open.

    `length` is how many bytes it is from the start of one window to the next; what does not fit into one, or is more
    than `longest`, is mapped by itself. Of more windows than `most` the oldest are let go.
    """

    def __init__(self, length: int = 1 << 30, *, longest: int | None = None, most: int | None = None) -> None:
        self.length = length
        self.longest = length if longest is None else longest
        self.most = most
        self._found: dict[tuple[Path, Identity, int], mmap.mmap] = {}

    def view(self, span: Span) -> memoryview:
        """The bytes of a span as private, writable memory that no other load shares."""
        number, start = divmod(span.offset, self.length)
        if span.nbytes > min(self.longest, self.length - start):
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


class ReadAhead(Windows):
    """Pieces of files that are read, for tensors that are looked at one after another: to read each of 100,000 small
    ones takes far longer.

    Nothing is mapped: a file that somebody cuts short meanwhile ends in an error, where to touch a mapping of it ends
    the process without a word. What is held stays small, the last piece alone. With `in_part`, of a large tensor only
    a few elements are wanted, and it is mapped all the same.
    """

    def __init__(self, length: int = 1 << 20, longest: int = 1 << 16, *, in_part: bool = False) -> None:
        super().__init__(length, longest=longest)
        self.in_part = in_part
        self._last: tuple[Path, Identity, int, memoryview] | None = None

    def view(self, span: Span) -> memoryview:
        """The bytes of a span in memory, with what follows them in the file as far as the piece goes."""
        if span.nbytes > self.longest:
            return span.mapping() if self.in_part else span.mapped()
        if self._last is not None:
            path, identity, first, piece = self._last
            start = span.offset - first
            if 0 <= start <= len(piece) - span.nbytes and (path, identity) == (span.path, span.identity):
                return piece[start : start + span.nbytes]
        first = span.offset - span.offset % mmap.PAGESIZE  # so that elements lie in memory as they do in the file
        whole = Span(span.path, first, min(self.length, span.identity[0] - first), span.identity)
        self._last = (span.path, span.identity, first, whole.mapped())
        return self.view(span)


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


@value_class
class TensorEntry:
    """One tensor of a checkpoint: a view into a storage, which is a span of the file or of several.

    `offset` and `stride` count elements. Tensors with the same `storage` are tied or views of one another.
    """

    shape: Shape
    dtype: str
    stride: Shape
    offset: int
    storage: Storage
    requires_grad: bool | None = None
    is_parameter: bool = False
    layout: ClassVar[str] = "strided"
    stored_bytes: ClassVar[int | None] = None

    @property
    def view(self) -> tuple[object, ...] | None:
        """Equal for two tensors that are the same part of the same storage; None where there is nothing to share."""
        # A storage that two tensors share is one object: that is what makes them tied.
        return (id(self.storage), self.offset, self.shape, self.stride, self.dtype) if self.storage.nbytes else None


@dataclass(frozen=True, slots=True)
class CompositeEntry:
    """One tensor of a checkpoint that is no view into one storage: quantized, sparse, or on the meta device.

    `parts` are the plain tensors that it is made of: of a quantized one its whole numbers (and scales and zero points,
    where each channel has its own), of a sparse one its indices and values. `made_by` is the inert call that makes it,
    as it is written again; it is None where torch has no such dtype, and the one part is its bytes.
    """

    shape: Shape
    dtype: str
    layout: str
    parts: tuple[TensorEntry, ...]
    stored_bytes: int
    made_by: Any
    requires_grad: bool | None = None
    is_parameter: bool = False

    @property
    def view(self) -> tuple[object, ...] | None:
        """Equal for two tensors that are made of the same parts; None where there is nothing to share."""
        views = tuple(part.view for part in self.parts)
        return (self.layout, self.dtype, self.shape, *views) if any(views) else None


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint holds.

    `tensors` is the state dict; `extras` its entries that are no tensors; `metadata` its `_metadata`. `tree` is the
    whole of a training checkpoint as inert values, and `key` the path of the state dict in it (None where the file is
    nothing but a state dict). `foreign` are the names of classes and functions outside the allow-list; none was
    looked up. `notes` are for a person. `types` are the class names of a pickled module, by path, and `kinds` says
    which of its tensors are parameters and which are buffers. `texts` is what
    safetensors' `__metadata__` holds beside what modelcli wrote there. `order` has the names of tensors and extras as
    they stand in the file, where there are both.

    `inner` are tensors that lie in `extras`, each named as Python reaches it. `unseen` are entries that torch makes
    tensors of, or in which something lies that only running code could tell from tensors, and that have no row;
    `hidden` are attributes of tensors in which tensors lie. Whoever vouches for the file has to say that these were not
    looked at.
    """

    path: Path
    format: str
    tensors: Mapping[str, TensorEntry | CompositeEntry]
    extras: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    record: Record | None = None
    tree: Any = None
    key: tuple[str | int, ...] | None = None
    foreign: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    inner: Mapping[str, TensorEntry | CompositeEntry] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> Mapping[str, TensorEntry | CompositeEntry]:
        """All tensors that have a row: those of the state dict, and those in its other entries."""
        return {**self.tensors, **self.inner} if self.inner else self.tensors

    def without_record(self) -> Contents:
        """The same file as keys alone: what its record says of an architecture, edits and flags is left aside."""
        if self.record is None:
            return self
        note = f"the record in {self.path.name} is left aside: its architecture, edits and flags are not carried on"
        return replace(self, record=None, notes=(*self.notes, note))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all entries of the state dict, in the order of the file."""
        return self.order or (*self.tensors, *self.extras)

    def without_objects(self) -> Contents:
        """The tensors and nothing else: what objects of foreign classes stood around them is dropped."""
        return replace(self, extras={}, metadata={}, record=None, tree=None, key=None, foreign=(), order=(), inner={})

    def infos(self) -> dict[str, TensorInfo]:
        """The tensors as a blueprint has them: ties found by storage, buffers told by their usual names."""
        budget = self._budget("the names of its tied tensors")
        first: dict[tuple[object, ...], str] = {}
        infos = {}
        uses = Counter(id(entry.storage) for entry in self.rows.values() if isinstance(entry, TensorEntry))
        for name, entry in self.rows.items():
            is_alone = isinstance(entry, TensorEntry) and uses[id(entry.storage)] == 1
            view = None if is_alone else entry.view
            original = first.setdefault(view, name) if view is not None else name
            if original is not name:
                budget.spend(len(original))
            info = info_of(name, entry, original, self.kinds.get(name))
            infos[name] = info if name in self.tensors else replace(info, requires_grad=None)
        return infos

    def bare_blueprint(self) -> Blueprint:
        """The tree of the key names; types are known only where the file names the classes of a pickled module."""
        budget = self._budget("the modules in its names", times=_MODULES_OF_A_TENSOR)
        return from_keys(self.infos().values(), self.types, lambda length: budget.spend(limits.ENTRY + length))

    def _budget(self, what: str, times: int = 1) -> limits.Budget:
        """What may be made of the names: as much as they take, so many times over."""
        names = (*self.rows, *self.types)
        nbytes = sum(map(len, names)) + limits.ENTRY * len(names)
        return limits.Budget(f"{self.path}: {what}", nbytes, times)


def foreign_names(names: Sequence[str], *, most: int) -> str:
    """Names of foreign classes and functions in a line: those that no tensor library has come first."""
    harmless = ("torch.", "torchvision.", "numpy.", "collections.")
    ordered = sorted(names, key=lambda name: name.startswith(harmless))
    return listed(ordered, most)


def info_of(
    name: str, entry: TensorEntry | CompositeEntry, original: str, known_kind: Kind | None = None
) -> TensorInfo:
    """An entry as a blueprint has it; `original` is the first name of the same tensor.

    Where no kind is known, the name and the dtype tell it.
    """
    is_trained = entry.is_parameter or bool(entry.requires_grad)
    guessed: Kind = "parameter" if is_trained or not looks_like_buffer(name, entry.dtype) else "buffer"
    return TensorInfo(
        name=name,
        shape=entry.shape,
        dtype=entry.dtype,
        kind=known_kind or guessed,
        # A state dict's tensors are detached: of them only a flag that is set says something.
        requires_grad=entry.requires_grad if entry.is_parameter or entry.requires_grad else None,
        tied_to=None if original == name else original,
        layout=entry.layout,
        stored_bytes=entry.stored_bytes,
    )


def looks_like_buffer(name: str, dtype: str) -> bool:
    """Whether a tensor of a bare checkpoint is a buffer: normalisation statistics, and what cannot be trained."""
    last = name.rpartition(".")[2]
    return last in ("running_mean", "running_var", "num_batches_tracked") or not dtype.startswith(
        ("float", "bfloat", "complex", "bcomplex", "qint", "quint")
    )
