"""Read folders of `torch.distributed.checkpoint`.

The pickle `.metadata` states where each part of each tensor is. The files of the ranks, `*.distcp`, contain the parts,
each as an archive of `torch.save`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from modelcli.checkpoints import limits, named_files, shapes, strict_json
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.distributed import blocks
from modelcli.checkpoints.distributed.names import METADATA, RECORD
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.storage import identity_of
from modelcli.checkpoints.torch_pickle import embedded, pickles, state_dicts, trees
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, sizes_in
from modelcli.errors import FileFormatError, SystemFailureError, UnsafeError
from modelcli.files.open_folder import read_regular
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Shape
from modelcli.wording import brief_repr, counted, listed

#: The bytes that the description of a part of a tensor takes in a `.metadata`.
_PART = 64
#: Entries of up to this size that are not tensors often repeat (a learning rate for each parameter): parse them once.
_SMALL = 4096

_PACKAGE = "torch.distributed.checkpoint"
_METADATA = (f"{_PACKAGE}.metadata.Metadata",)
_TENSOR = (f"{_PACKAGE}.metadata.TensorStorageMetadata",)
_BYTES = (f"{_PACKAGE}.metadata.BytesStorageMetadata",)
_CHUNK = (f"{_PACKAGE}.metadata.ChunkStorageMetadata",)
_INDEX = (f"{_PACKAGE}.metadata.MetadataIndex",)
_INFO = (f"{_PACKAGE}.filesystem._StorageInfo",)
#: The second is its name before torch 2.3.
_PROPERTIES = (
    f"{_PACKAGE}.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
)
#: The names in a `.metadata` besides those that any file of tensors may have.
_EXPECTED = frozenset(
    {
        *(*_METADATA, *_TENSOR, *_BYTES, *_CHUNK, *_INDEX, *_INFO, *_PROPERTIES),
        f"{_PACKAGE}.metadata.StorageMeta",
        f"{_PACKAGE}.metadata._MEM_FORMAT_ENCODING",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        # The folder that was written to, as a path.
        *(
            f"{module}.{prefix}{system}Path"
            for module in ("pathlib", "pathlib._local")
            for prefix in ("", "Pure")
            for system in ("Posix", "Windows")
        ),
    }
)

#: The keys and indices that lead to a value in the nested dicts and lists that were saved.
KeyPath = tuple[str | int, ...]
#: Where each part is, by the name of its tensor and its offsets in the tensor (None for an entry that is not a tensor).
PartSpans = Mapping[tuple[str, Shape | None], embedded.ArchiveSpan]


def read(path: Path, key: str | None) -> Contents:
    """Read a `.metadata` and the entries that are not tensors. The bytes of tensors are not read.

    Each tensor is row-major, as `torch.distributed.checkpoint.load` returns it. Raises FileFormatError if the parts of
    a tensor do not cover it, or are not in the files.
    """
    try:
        limits.INDEX_BYTES.check(path.stat().st_size, str(path))
        data = read_regular(path)
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    pickled = pickles.read(data, str(path))
    budget = pickled.budget
    foreign = tuple(name for name in pickled.foreign if name not in _EXPECTED)
    folder = _Folder(path, budget)
    try:
        tensors, values, key_paths = folder.items(pickled.value)
    except FileFormatError:
        if foreign:
            raise UnsafeError(
                f"{path} does not describe a checkpoint: it contains objects of {listed(foreign, 3)}, and loading them "
                "would run code"
            ) from None
        raise
    whole = _tree(path, tensors | values, key_paths, budget)
    tree, key, notes = _chosen(path.parent, whole, key)
    inert = pickles.Pickle(
        tree, tuple(dict.fromkeys((*foreign, *folder.foreign))), budget, (*pickled.attributes, *folder.attributes)
    )
    record, record_notes = _record_beside(path, data)
    contents = trees.contents_of(path.parent, inert, key, record)
    note = f"{counted(len(contents.tensors), 'tensor')} in {counted(len(folder.files), 'file')}, as {METADATA} says"
    # Entries that were left out may belong to the model, so a check must not claim to have seen everything.
    left_out = [name for name in whole if name not in tree and state_dicts.may_be_of_a_model(name, whole[name], budget)]
    return replace(
        contents,
        format="dcp",
        notes=(note, *notes, *record_notes, *contents.notes),
        unseen=(*contents.unseen, *left_out),
    )


def _record_beside(path: Path, metadata: bytes) -> tuple[str | None, tuple[str, ...]]:
    """Return the text of modelcli's record beside a `.metadata`, and notes.

    A record of another `.metadata` is ignored: another program has written the folder since.
    """
    beside = path.parent / RECORD
    if not beside.is_file():
        return None, ()
    try:
        limits.INDEX_BYTES.check(beside.stat().st_size, str(beside))
        document = strict_json.loads(read_regular(beside), str(beside))
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("record"), str):
        return None, (f"{RECORD} was ignored: it is no record of modelcli",)
    if document.get("metadata") != hashlib.sha256(metadata).hexdigest():
        return None, (f"{RECORD} was ignored: another program has written {path.name} since",)
    return document["record"], ()


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A rectangular part of a tensor: `sizes` elements along each dimension, from `offsets`."""

    offsets: Shape
    sizes: Shape


@dataclass
class _Folder:
    """The content of a `.metadata`, checked against the files beside it. Its entries may share objects."""

    path: Path
    budget: limits.Budget
    files: dict[str, tuple[Path, tuple[int, int, int]]] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    attributes: list[tuple[str, Any]] = field(default_factory=list)
    parsed: dict[bytes | embedded.ArchiveSpan, Any] = field(default_factory=dict)

    def items(self, value: Any) -> tuple[dict[str, TensorEntry], dict[str, Any], Mapping[str, KeyPath]]:
        """Return the tensors and the other values by their flat names, and the key path of each."""
        metadata = self._fields(value, _METADATA, "the top-level object")
        entries = self._dict(metadata.get("state_dict_metadata"), "state_dict_metadata")
        spans = self._part_spans(self._dict(metadata.get("storage_data"), "storage_data"))
        key_paths = self._key_paths(metadata.get("planner_data"), entries)
        tensors, values = {}, {}
        for name in entries:
            if not isinstance(name, str):
                raise self._damaged(f"the name of an entry is {brief_repr(name)}, not a text")
        # `planner_data` is in the order of saving; the entries are in the order of the ranks that wrote them.
        for name in key_paths:
            entry = entries[name]
            if _is(entry, _BYTES):
                values[name] = self._value(name, spans)
            else:
                tensors[name] = self._tensor(name, entry, spans)
        return tensors, values, key_paths

    def _tensor(self, name: str, entry: Any, spans: PartSpans) -> TensorEntry:
        fields = self._fields(entry, _TENSOR, name)
        dtype = self._dtype(name, fields.get("properties"))
        shape = self._sizes(name, fields.get("size"), shapes.shape)
        stated = self._list(fields.get("chunks"), name)
        self.budget.spend((_PART + len(shape)) * len(stated))
        chunks = [self._chunk(name, chunk, shape) for chunk in stated]
        # Ranks beyond the last row have an empty part; all parts of an empty tensor are empty.
        chunks = [chunk for chunk in chunks if 0 not in chunk.sizes] or chunks[:1]
        if not chunks or (0 not in shape and not blocks.cover_once(shape, chunks, self.budget)):
            raise self._damaged(f"the parts of {name} do not cover its shape {list(shape)} exactly once")
        found = [self._block(name, dtype, chunk, spans) for chunk in chunks]
        storage = blocks.joined(shape, ITEM_BYTES[dtype], found)
        return TensorEntry(shape, dtype, shapes.row_major(shape), 0, storage, requires_grad=False)

    def _block(self, name: str, dtype: str, chunk: _Chunk, spans: PartSpans) -> blocks.Block:
        """Return a part of a tensor with its bytes."""
        span = spans.get((name, chunk.offsets))
        if span is None:
            raise self._damaged(f"it does not state which file has the part of {name} at {list(chunk.offsets)}")
        part = embedded.TensorSpan(span, chunk.sizes, dtype)
        if part.nbytes > span.length:
            raise self._damaged(
                f"the part of {name} at {list(chunk.offsets)} needs {part.nbytes:,} bytes, "
                f"but has {span.length:,} in {span.path.name}"
            )
        return blocks.Block(chunk.offsets, chunk.sizes, part)

    def _value(self, name: str, spans: PartSpans) -> Any:
        """Read an entry that is not a tensor, as an inert value. All are read, to know which classes they name."""
        span = spans.get((name, None))
        if span is None:
            raise self._damaged(f"it does not state which file has {name}")
        unnamed = replace(span, name="")
        data = self._bytes(span) if span.length <= _SMALL else None
        for known in (unnamed, data):
            if known in self.parsed:
                return self.parsed[known]
        pickled = embedded.read(span, self.budget)
        self.foreign.extend(pickled.foreign)
        self.attributes.extend(pickled.attributes)
        self.parsed[unnamed] = pickled.value
        if data is not None and _is_plain(pickled.value):
            self.parsed[data] = pickled.value
        return pickled.value

    def _bytes(self, span: embedded.ArchiveSpan) -> bytes:
        try:
            with span.path.open("rb") as file:
                file.seek(span.offset)
                return file.read(span.length)
        except OSError as error:
            raise SystemFailureError(f"cannot read {span.path}: {error.strerror or error}") from None

    def _part_spans(self, data: Mapping[Any, Any]) -> PartSpans:
        spans: dict[tuple[str, Shape | None], embedded.ArchiveSpan] = {}
        for key, value in data.items():
            index = self._fields(key, _INDEX, "storage_data")
            name, offset = index.get("fqn"), index.get("offset")
            if not isinstance(name, str):
                raise self._damaged(f"storage_data has the name {brief_repr(name)}, which is not a text")
            at = None if offset is None else self._sizes(name, offset)
            if (name, at) in spans:
                raise self._damaged(f"storage_data lists the part of {name} at {at} twice")
            spans[name, at] = self._part_span(name, self._fields(value, _INFO, name))
        return spans

    def _part_span(self, name: str, info: Mapping[str, Any]) -> embedded.ArchiveSpan:
        file, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if info.get("transform_descriptors"):
            descriptors = self._list(info["transform_descriptors"], name)
            words = ", ".join(word for word in descriptors if isinstance(word, str))
            raise FileFormatError(
                f"{self.path}: {name} was written with the extensions {words}, which modelcli cannot reverse",
                "load it with torch.distributed.checkpoint, and save it without extensions",
            )
        if not isinstance(file, str) or not _is_size(offset) or not _is_size(length):
            raise self._damaged(f"it does not state a file, an offset and a length for {name}")
        if file not in self.files:
            path = named_files.inside(self.path, file)
            try:
                self.files[file] = path, identity_of(path)
            except OSError as error:
                raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
        path, identity = self.files[file]
        if offset + length > identity[0]:
            raise FileFormatError.damaged(
                str(path), f"{name} should end at byte {offset + length:,}, but the file has {identity[0]:,} bytes"
            )
        return embedded.ArchiveSpan(path, offset, length, identity, name)

    def _key_paths(self, data: Any, entries: Mapping[Any, Any]) -> dict[str, KeyPath]:
        """Return the key path of each entry: from `planner_data` if nested values were flattened, else its name."""
        given = {} if data is None else self._dict(data, "planner_data")
        key_paths: dict[str, KeyPath] = {}
        for name, key_path in given.items():
            if name not in entries:
                continue
            if (
                not isinstance(key_path, tuple)
                or not key_path
                or len(key_path) > limits.NESTING.value
                or not isinstance(key_path[0], str)
                or not all(isinstance(step, str) or _is_size(step) for step in key_path)
            ):
                raise self._damaged(f"planner_data has a path for {name} that does not consist of names and numbers")
            self.budget.spend(len(key_path))
            key_paths[name] = key_path
        for name in entries:
            key_paths.setdefault(name, (name,))
        return key_paths

    def _dtype(self, name: str, properties: Any) -> str:
        if not _is(properties, _PROPERTIES) or not isinstance(properties.state, tuple) or len(properties.state) < 5:
            raise self._damaged(f"the properties of {name} are not those of a tensor")
        dtype, layout = properties.state[:2]
        if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in ITEM_BYTES:
            raise self._damaged(f"the dtype of {name} is not a dtype of torch")
        if not _is(layout, ("torch.serialization._get_layout",)) or layout.args != ("torch.strided",):
            raise FileFormatError(
                f"{self.path}: {name} is not a dense tensor, and modelcli reads only dense ones here",
                "load the folder with torch.distributed.checkpoint, and save the state dict with torch.save",
            )
        return dtype.name

    def _chunk(self, name: str, value: Any, shape: Shape) -> _Chunk:
        fields = self._fields(value, _CHUNK, name)
        chunk = _Chunk(self._sizes(name, fields.get("offsets")), self._sizes(name, fields.get("sizes")))
        if not len(chunk.offsets) == len(chunk.sizes) == len(shape) or any(
            offset + size > whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        ):
            raise self._damaged(
                f"a part of {name} of shape {list(chunk.sizes)} at {list(chunk.offsets)} is outside {list(shape)}"
            )
        return chunk

    def _sizes(self, name: str, value: Any, checked: Callable[[Any, str], Shape] = shapes.sizes) -> Shape:
        """Return the sizes in a `torch.Size`, each below 2^63."""
        try:
            return checked(sizes_in(value), f"{self.path}: {name}")
        except (ValueError, TypeError) as error:
            raise self._damaged(f"the shape or offset of {name} is wrong: {error}") from None

    def _fields(self, value: Any, classes: tuple[str, ...], where: str) -> Mapping[str, Any]:
        if not _is(value, classes) or not isinstance(value.state, dict):
            raise self._damaged(f"{where} should be a {classes[0].rpartition('.')[2]}")
        return value.state

    def _dict(self, value: Any, where: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise self._damaged(f"{where} should be a dict")
        return value

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self._damaged(f"the parts of {where} should be a list")
        return value

    def _damaged(self, what: str) -> FileFormatError:
        return FileFormatError.damaged(str(self.path), what)


def _is(value: Any, classes: tuple[str, ...]) -> bool:
    """Whether an inert value was made by one of these classes or functions."""
    return isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.dotted in classes


def _is_plain(value: Any) -> bool:
    """Whether a value is immutable, so that two entries may share it."""
    if isinstance(value, tuple):
        return all(item is None or isinstance(item, bool | int | float | str) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def _is_optimizer(name: object) -> bool:
    return isinstance(name, str) and name.startswith("optim")


def _tree(
    path: Path, leaves: Mapping[str, Any], key_paths: Mapping[str, KeyPath], budget: limits.Budget
) -> dict[str, Any]:
    """Return the nested dicts and lists that were saved, the state of optimizers last.

    A key path may name any index of a list; the missing items before it are added as None, which the budget pays for.
    """
    tree: dict[str, Any] = {}
    for name, key_path in sorted(key_paths.items(), key=lambda item: _is_optimizer(item[1][0])):
        container: Any = tree
        for step, below in itertools.zip_longest(key_path, key_path[1:]):
            if isinstance(container, list) and isinstance(step, int):
                missing = max(step + 1 - len(container), 0)
                budget.spend(missing, name)
                container.extend([None] * missing)
                found = container[step]
            elif isinstance(container, dict) and isinstance(step, str):
                found = container.get(step)
            else:
                raise FileFormatError.damaged(str(path), f"the path of {name} leads through another entry")
            if below is None:
                if found is not None:
                    raise FileFormatError.damaged(str(path), f"another entry has the same path as {name}")
                container[step] = leaves[name]
            elif found is None:
                container[step] = {} if isinstance(below, str) else []
                container = container[step]
            else:
                container = found
    return tree


def _chosen(folder: Path, tree: dict[str, Any], key: str | None) -> tuple[dict[str, Any], str | None, tuple[str, ...]]:
    """Choose the state dict of a folder. Returns the tree to take it from, its key (or None), and notes.

    Two layouts occur only in such folders: the model's tensors at the top with the training state in dicts beside them,
    and the model and its optimizer together in one dict.
    """
    if key is not None or _model_in(tree) is not None:
        return tree, key, ()
    below = [name for name, value in tree.items() if isinstance(value, dict) and not name.endswith("_extra_state")]
    if below and any(isinstance(value, TensorEntry) for value in tree.values()):
        own = {name: value for name, value in tree.items() if name not in below}
        names = listed(below, 6)
        return (
            own,
            None,
            (f"took the tensors at the top of {folder.name} and left out {names}; --key takes another",),
        )
    if len(below) == 1 and (name := _model_in(tree[below[0]])) is not None:
        key = f"{below[0]}.{name}"
        return tree, key, (f"took the state dict under {key!r} of {folder.name}",)
    return tree, None, ()


def _model_in(tree: Mapping[str, Any]) -> str | None:
    """Return the usual name of a state dict that a dict has, or None."""
    return next((name for name in state_dicts.STATE_DICT_KEYS if isinstance(tree.get(name), dict)), None)
