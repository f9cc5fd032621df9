"""Read pickles that torch.save did not write: state dicts of `pickle.dump`, and NumPy arrays by name (detectron2).

The pickle contains the values, so the whole file is read, but it is never unpickled. Texts and bytes of Python 2 are
decoded as `pickle.load(file, encoding="latin1")` decodes them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelcli.checkpoints import limits, shapes
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.storage import CHUNK, FileId, Windows, identity_of
from modelcli.checkpoints.torch_pickle import legacy_format, pickles, trees
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, StorageRef
from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.model.dtypes import ITEM_BYTES

#: The functions and classes in such files that this module interprets.
_LOAD_STORAGE = "torch.storage._load_from_bytes"
_RECONSTRUCT = frozenset(f"numpy.{package}.multiarray._reconstruct" for package in ("core", "_core"))
_FROM_BUFFER = frozenset(f"numpy.{package}.numeric._frombuffer" for package in ("core", "_core"))
_ARRAYS = frozenset(
    {*_RECONSTRUCT, *_FROM_BUFFER, "numpy.ndarray", "numpy.dtype", "__builtin__.bytes", "builtins.bytes"}
)
#: torch's dtypes by the letter and size of NumPy's.
_DTYPES = {
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
    "b1": "bool",
    **{f"i{size}": f"int{8 * size}" for size in (1, 2, 4, 8)},
    **{f"u{size}": f"uint{8 * size}" for size in (1, 2, 4, 8)},
}


@dataclass(frozen=True, slots=True)
class PickledBytes:
    """Bytes in memory that were inside a pickle."""

    data: memoryview
    file: FileId

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def files(self) -> Iterable[FileId]:
        return (self.file,)

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), CHUNK):
            yield bytes(self.data[start : start + CHUNK])

    def bytes(self) -> bytes:
        return bytes(self.data)

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        return memoryview(bytearray(self.data))

    def part(self, start: int, nbytes: int) -> PickledBytes:
        return PickledBytes(self.data[start : start + nbytes], self.file)

    def __hash__(self) -> int:
        return id(self.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PickledBytes) and self.data is other.data


def read(path: Path, key: str | None) -> Contents:
    """Read a pickle as inert values, with a tensor for each array and tensor in it.

    Raises FileFormatError if it is damaged, or larger than `MODELCLI_MAX_WHOLE_PICKLE_BYTES`.
    """
    try:
        identity = identity_of(path)
        limits.WHOLE_PICKLE_BYTES.check(identity[0], str(path))
        data = path.read_bytes()
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    reader = _Reader(path, (path, identity))
    stream = io.BytesIO(data)
    pickled = pickles.read(stream, str(path), encoding="latin1", calls={_LOAD_STORAGE: reader.storage})
    if stream.tell() != len(data):
        raise FileFormatError.damaged(str(path), f"{len(data) - stream.tell():,} bytes follow the end of the pickle")
    tree = reader.with_tensors(pickled.value, pickled.budget)
    left = _names_in(tree)
    foreign = tuple(name for name in pickled.foreign if name not in _ARRAYS or name in left)
    contents = trees.contents_of(path, replace(pickled, value=tree, foreign=foreign), key)
    note = f"{path.name} is a pickle that torch.save did not write: modelcli save writes it as a checkpoint"
    return replace(contents, format="pickle", notes=(note, *contents.notes))


@dataclass
class _Reader:
    """Makes tensors of the arrays and storages in a pickle."""

    path: Path
    file: FileId
    #: The decoded texts and bytes, by their identity: a small file can use a large one many times.
    encoded: dict[int, tuple[Any, bytes | None]] = field(default_factory=dict)
    storages: dict[int, StorageRef | None] = field(default_factory=dict)

    def storage(self, args: tuple[Any, ...]) -> StorageRef | None:
        """Return the storage of `torch.storage._load_from_bytes(bytes)`, whose bytes are a file of torch.save."""
        data = self._bytes_of(args[0]) if len(args) == 1 else None
        if data is None:
            return None
        if id(data) not in self.storages:
            self.storages[id(data)] = legacy_format.storage_in(
                data, f"{self.path}: a storage inside the pickle", self._held
            )
        return self.storages[id(data)]

    def _bytes_of(self, value: Any) -> bytes | None:
        """Return the bytes in a value, however they were pickled; the same object for the same value. Else None."""
        plain = _innermost(value)
        if id(plain) not in self.encoded:
            self.encoded[id(plain)] = plain, _encoded(plain)
        return self.encoded[id(plain)][1]

    def _held(self, data: memoryview) -> PickledBytes:
        return PickledBytes(data, self.file)

    def with_tensors(self, value: Any, budget: limits.Budget) -> Any:
        """Return the same tree with a tensor for each array in its dicts and lists. These are changed in place."""
        found = self._tensor(value)
        if found is not None:
            return found
        made: dict[int, TensorEntry] = {}
        seen: set[int] = set()
        stack = [value]
        while stack:
            holder = stack.pop()
            if id(holder) in seen or not isinstance(holder, dict | list):
                continue
            seen.add(id(holder))
            budget.spend(len(holder))
            for key, item in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                if id(item) not in made and (tensor := self._tensor(item)) is not None:
                    made[id(item)] = tensor
                if id(item) in made:
                    holder[key] = made[id(item)]
                else:
                    stack.append(item)
        return value

    def _tensor(self, value: Any) -> TensorEntry | None:
        """Return an array of numbers as a tensor; None for any other value."""
        if not isinstance(value, Opaque) or not isinstance(value.call, Global):
            return None
        match value.call.dotted, value.args, value.state:
            case name, _, (_, tuple() as shape, dtype, bool() as is_fortran, data) if name in _RECONSTRUCT:
                order = "F" if is_fortran else "C"
            case name, (data, dtype, tuple() as shape, str() as order), None if name in _FROM_BUFFER:
                pass
            case _:
                return None
        kind, found = self._dtype(dtype), self._bytes_of(data)
        if kind is None or found is None:
            return None
        where = f"{self.path}: an array of shape {list(shape)}"
        sizes = shapes.shape(shape, where)
        stride = shapes.row_major(sizes) if order == "C" else shapes.row_major(sizes[::-1])[::-1]
        if len(found) != shapes.extent(sizes, stride) * ITEM_BYTES[kind]:
            raise FileFormatError.damaged(
                where, f"its elements of dtype {kind} do not take the {len(found):,} bytes that it has"
            )
        return TensorEntry(sizes, kind, stride, 0, self._held(memoryview(found)))

    def _dtype(self, value: Any) -> str | None:
        """Return torch's dtype for a dtype of NumPy; None if torch has none."""
        match value:
            case Opaque(call=Global(module="numpy", name="dtype"), args=(str() as code, *_), state=state):
                order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
                kind = _DTYPES.get(code)
                if kind is not None and order == ">" and ITEM_BYTES[kind] > 1:
                    raise FileFormatError(
                        f"{self.path}: an array has big-endian values, but modelcli reads little-endian ones",
                        "convert it with NumPy, array.astype(array.dtype.newbyteorder('<')), and save it again",
                    )
                return kind
        return None


def _innermost(value: Any) -> Any:
    """Return the text or bytes inside the calls that make bytes; the value itself if it is not such a call."""
    for _ in range(2):
        match value:
            case Opaque(call=Global(module="_codecs", name="encode"), args=(str() as text, "latin1" | "latin-1")):
                return text
            case Opaque(call=Global(name="bytearray"), args=(inner,)):
                value = inner
            case Opaque(call=Global(name="bytes"), args=()):
                return b""
    return value


def _encoded(value: Any) -> bytes | None:
    """Return bytes unchanged, and texts as Python 2 wrote them; None for any other value."""
    if isinstance(value, bytes):
        return value
    try:
        return value.encode("latin-1") if isinstance(value, str) else None
    except UnicodeEncodeError:
        return None


def _names_in(tree: Any) -> set[str]:
    """Return the names of all classes and functions in a tree."""
    found: set[str] = set()
    seen: set[int] = set()
    stack = [tree]
    while stack:
        value = stack.pop()
        if isinstance(value, Global):
            found.add(value.dotted)
        elif id(value) not in seen:
            seen.add(id(value))
            stack += trees.within(value)
    return found
