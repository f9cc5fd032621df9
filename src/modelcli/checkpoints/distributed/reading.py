"""Folders of `torch.distributed.checkpoint`: `.metadata`, a pickle that says which part of which tensor lies where, and
the files of the ranks, `*.distcp`, in which each part is an archive of `torch.save` by itself."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from modelcli.checkpoints import limits, named_files, shapes
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.distributed import METADATA, blocks
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.storage import JoinedSpan, Storage, identity_of
from modelcli.checkpoints.torch_pickle import embedded, pickles, state_dicts, trees
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, sizes_in
from modelcli.errors import FileFormatError, SystemFailureError, UnsafeError
from modelcli.files.open_folder import read_regular
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Shape
from modelcli.wording import counted, listed

#: What an account of a part of a tensor takes in a `.metadata`, and what one of its corners is to be counted as.
_PART, _CORNER = 64, 8
#: Entries that are no tensors repeat one another (a learning rate for each parameter): these are parsed once.
_SMALL = 4096

_PACKAGE = "torch.distributed.checkpoint"
_METADATA = (f"{_PACKAGE}.metadata.Metadata",)
_TENSOR = (f"{_PACKAGE}.metadata.TensorStorageMetadata",)
_BYTES = (f"{_PACKAGE}.metadata.BytesStorageMetadata",)
_CHUNK = (f"{_PACKAGE}.metadata.ChunkStorageMetadata",)
_INDEX = (f"{_PACKAGE}.metadata.MetadataIndex",)
_INFO = (f"{_PACKAGE}.filesystem._StorageInfo",)
#: The second is where torch before 2.3 had it.
_PROPERTIES = (
    f"{_PACKAGE}.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
)
#: What stands in a `.metadata` besides what any file of tensors may name.
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

#: The way to a value in the nested dicts and lists that were saved.
Way = tuple[str | int, ...]
#: Where parts lie, by the name of their tensor and their offsets in it (None for what is no tensor).
Places = Mapping[tuple[str, Shape | None], embedded.Place]


def read(path: Path, key: str | None) -> Contents:
    """Read a `.metadata` and the entries that are no tensors; no tensor's bytes are touched.

    Each tensor is row-major, as `torch.distributed.checkpoint.load` gives it. Raises FileFormatError where the parts
    of a tensor do not make it up, or are not in the files.
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
        tensors, values, ways = folder.items(pickled.value)
    except FileFormatError:
        if foreign:
            raise UnsafeError(
                f"{path} is no account of a checkpoint, but holds objects of {listed(foreign, 3)}; "
                "to load them would run code"
            ) from None
        raise
    whole = _tree(path, tensors | values, ways, budget)
    tree, key, notes = _chosen(path.parent, whole, key)
    inert = pickles.Pickle(
        tree, tuple(dict.fromkeys((*foreign, *folder.foreign))), budget, (*pickled.attributes, *folder.attributes)
    )
    contents = trees.contents_of(path.parent, inert, key)
    note = f"{counted(len(contents.tensors), 'tensor')} in {counted(len(folder.files), 'file')}, as {METADATA} says"
    # Whether what was left out belongs to the model is a guess: whoever vouches for the model has not looked at it.
    left_out = [name for name in whole if name not in tree and state_dicts.may_be_of_a_model(name, whole[name], budget)]
    return replace(contents, format="dcp", notes=(note, *notes, *contents.notes), unseen=(*contents.unseen, *left_out))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A part of a tensor: a box of `sizes` at `offsets`."""

    offsets: Shape
    sizes: Shape


@dataclass
class _Folder:
    """What a `.metadata` says, checked against the files beside it; entries may share whatever they are made of."""

    path: Path
    budget: limits.Budget
    files: dict[str, tuple[Path, tuple[int, int, int]]] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    attributes: list[tuple[str, Any]] = field(default_factory=list)
    parsed: dict[bytes | embedded.Place, Any] = field(default_factory=dict)

    def items(self, value: Any) -> tuple[dict[str, TensorEntry], dict[str, Any], Mapping[str, Way]]:
        """Tensors and other values by their flat names, and the ways to them."""
        metadata = self._fields(value, _METADATA, "the whole")
        entries = self._dict(metadata.get("state_dict_metadata"), "state_dict_metadata")
        places = self._places(self._dict(metadata.get("storage_data"), "storage_data"))
        ways = self._ways(metadata.get("planner_data"), entries)
        tensors, values = {}, {}
        for name in entries:
            if not isinstance(name, str):
                raise self._damaged("the name of an entry is no text")
        # In the order in which they were saved: the entries are in that of the ranks that wrote them.
        for name in ways:
            entry = entries[name]
            if _is(entry, _BYTES):
                values[name] = self._value(name, places)
            else:
                tensors[name] = self._tensor(name, entry, places)
        return tensors, values, ways

    def _tensor(self, name: str, entry: Any, places: Places) -> TensorEntry:
        fields = self._fields(entry, _TENSOR, name)
        dtype = self._dtype(name, fields.get("properties"))
        shape = self._sizes(name, fields.get("size"), shapes.shape)
        stated = self._list(fields.get("chunks"), name)
        self.budget.spend((_PART + len(shape)) * len(stated))
        chunks = [self._chunk(name, chunk, shape) for chunk in stated]
        # Ranks beyond the last row have an empty part; an empty tensor has no other.
        chunks = [chunk for chunk in chunks if 0 not in chunk.sizes] or chunks[:1]
        if not chunks or (0 not in shape and not self._covers_once(name, shape, chunks)):
            raise self._damaged(f"the parts of {name} do not cover its shape {list(shape)} exactly once")
        storage = self._storage(name, dtype, shape, chunks, places)
        return TensorEntry(shape, dtype, shapes.row_major(shape), 0, storage, requires_grad=False)

    def _storage(self, name: str, dtype: str, shape: Shape, chunks: Sequence[_Chunk], places: Places) -> Storage:
        """The bytes of a tensor, put together from its parts: one behind another where each is one run of them."""
        parts: list[tuple[int, embedded.TensorSpan]] = []
        found: list[blocks.Block] = []
        scattered = False
        for chunk in chunks:
            place = places.get((name, chunk.offsets))
            if place is None:
                raise self._damaged(f"it does not say where the part of {name} at {list(chunk.offsets)} is")
            part = embedded.TensorSpan(place, chunk.sizes, dtype)
            if part.nbytes > place.length:
                raise self._damaged(
                    f"the part of {name} at {list(chunk.offsets)} needs {part.nbytes:,} bytes, "
                    f"and {place.path.name} gives it {place.length:,}"
                )
            start = _run_start(shape, chunk)
            scattered = scattered or start is None
            parts.append((start or 0, part))
            found.append(blocks.Block(chunk.offsets, chunk.sizes, part))
        if scattered:
            return blocks.storage_of(shape, ITEM_BYTES[dtype], found)
        if len(parts) == 1:
            return parts[0][1]
        return JoinedSpan(tuple(part for _, part in sorted(parts, key=lambda item: item[0])))

    def _covers_once(self, name: str, shape: Shape, chunks: Sequence[_Chunk]) -> bool:
        """Whether boxes fill a shape without hole or overlap.

        They do where the alternating sum over the corners of all boxes leaves that of the whole: the corners
        determine how often each element is covered, as differences determine a function.
        """
        if len(chunks) == 1:
            return chunks[0].sizes == shape
        cut = [axis for axis, size in enumerate(shape) if any(chunk.sizes[axis] != size for chunk in chunks)]
        self.budget.spend(_CORNER * len(chunks) * 2 ** len(cut))
        corners: Counter[Shape] = Counter()
        ends = list(itertools.product((0, 1), repeat=len(cut)))
        for chunk, times in [(_Chunk((0,) * len(shape), shape), -1), *((chunk, 1) for chunk in chunks)]:
            for end in ends:
                point = tuple(chunk.offsets[axis] + chunk.sizes[axis] * far for axis, far in zip(cut, end, strict=True))
                corners[point] += times * (-1) ** sum(end)
        return not any(corners.values())

    def _value(self, name: str, places: Places) -> Any:
        """An entry that is no tensor, inert. All are read: what classes they name has to be known."""
        place = places.get((name, None))
        if place is None:
            raise self._damaged(f"it does not say where {name} is")
        lies = replace(place, name="")
        data = self._bytes(place) if place.length <= _SMALL else None
        for known in (lies, data):
            if known in self.parsed:
                return self.parsed[known]
        pickled = embedded.read(place, self.budget)
        self.foreign.extend(pickled.foreign)
        self.attributes.extend(pickled.attributes)
        self.parsed[lies] = pickled.value
        if data is not None and _is_plain(pickled.value):
            self.parsed[data] = pickled.value
        return pickled.value

    def _bytes(self, place: embedded.Place) -> bytes:
        try:
            with place.path.open("rb") as file:
                file.seek(place.offset)
                return file.read(place.length)
        except OSError as error:
            raise SystemFailureError(f"cannot read {place.path}: {error.strerror or error}") from None

    def _places(self, data: Mapping[Any, Any]) -> Places:
        places: dict[tuple[str, Shape | None], embedded.Place] = {}
        for key, value in data.items():
            index = self._fields(key, _INDEX, "storage_data")
            name, offset = index.get("fqn"), index.get("offset")
            if not isinstance(name, str):
                raise self._damaged("storage_data has a name that is no text")
            at = None if offset is None else self._sizes(name, offset)
            if (name, at) in places:
                raise self._damaged(f"storage_data has the part of {name} at {at} twice")
            places[name, at] = self._place(name, self._fields(value, _INFO, name))
        return places

    def _place(self, name: str, info: Mapping[str, Any]) -> embedded.Place:
        file, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if info.get("transform_descriptors"):
            descriptors = self._list(info["transform_descriptors"], name)
            words = ", ".join(word for word in descriptors if isinstance(word, str))
            raise FileFormatError(
                f"{self.path}: {name} was written through a transform ({words}), which is not undone here",
                "load it with torch.distributed.checkpoint, and save it without extensions",
            )
        if not isinstance(file, str) or not _is_size(offset) or not _is_size(length):
            raise self._damaged(f"the place of {name} is not a file, an offset and a length")
        if file not in self.files:
            path = named_files.inside(self.path, file)
            try:
                self.files[file] = path, identity_of(path)
            except OSError as error:
                raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
        path, identity = self.files[file]
        if offset + length > identity[0]:
            raise FileFormatError(
                f"{path} is cut off: {name} ends at byte {offset + length:,}, and the file has {identity[0]:,}"
            )
        return embedded.Place(path, offset, length, identity, name)

    def _ways(self, data: Any, entries: Mapping[Any, Any]) -> dict[str, Way]:
        """The way to each entry: `planner_data`, where the planner flattened what was nested."""
        given = {} if data is None else self._dict(data, "planner_data")
        ways: dict[str, Way] = {}
        for name, way in given.items():
            if name not in entries:
                continue
            if (
                not isinstance(way, tuple)
                or not way
                or len(way) > limits.NESTING.value
                or not isinstance(way[0], str)
                or not all(isinstance(step, str) or _is_size(step) for step in way)
            ):
                raise self._damaged("planner_data has a path that is not made of names and numbers")
            self.budget.spend(len(way))
            ways[name] = way
        for name in entries:
            ways.setdefault(name, (name,))
        return ways

    def _dtype(self, name: str, properties: Any) -> str:
        if not _is(properties, _PROPERTIES) or not isinstance(properties.state, tuple) or len(properties.state) < 5:
            raise self._damaged(f"the properties of {name} are none of a tensor")
        dtype, layout = properties.state[:2]
        if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in ITEM_BYTES:
            raise self._damaged(f"the dtype of {name} is not one of torch's")
        if not _is(layout, ("torch.serialization._get_layout",)) or layout.args != ("torch.strided",):
            raise FileFormatError(f"{self.path}: {name} is no dense tensor")
        return dtype.name

    def _chunk(self, name: str, value: Any, shape: Shape) -> _Chunk:
        fields = self._fields(value, _CHUNK, name)
        chunk = _Chunk(self._sizes(name, fields.get("offsets")), self._sizes(name, fields.get("sizes")))
        if not len(chunk.offsets) == len(chunk.sizes) == len(shape) or any(
            offset + size > whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        ):
            raise self._damaged(
                f"a part of {name} of sizes {list(chunk.sizes)} at {list(chunk.offsets)} is outside {list(shape)}"
            )
        return chunk

    def _sizes(self, name: str, value: Any, checked: Callable[[Any, str], Shape] = shapes.sizes) -> Shape:
        """A `torch.Size` of numbers below 2^63."""
        try:
            return checked(sizes_in(value), f"{self.path}: {name}")
        except (ValueError, TypeError) as error:
            raise self._damaged(f"{name} has a shape or an offset that is none: {error}") from None

    def _fields(self, value: Any, classes: tuple[str, ...], where: str) -> Mapping[str, Any]:
        if not _is(value, classes) or not isinstance(value.state, dict):
            raise self._damaged(f"{where} is no {classes[0].rpartition('.')[2]}")
        return value.state

    def _dict(self, value: Any, where: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise self._damaged(f"{where} is no dict")
        return value

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self._damaged(f"what {where} is made of is no list")
        return value

    def _damaged(self, what: str) -> FileFormatError:
        return FileFormatError(f"{self.path} is damaged: {what}")


def _run_start(shape: Shape, chunk: _Chunk) -> int | None:
    """Where a box starts in the row-major tensor, in elements; None where it is not one run of it."""
    first = next((axis for axis, size in enumerate(chunk.sizes) if size != 1), len(shape))
    if chunk.sizes[first + 1 :] != shape[first + 1 :]:
        return None
    return sum(offset * step for offset, step in zip(chunk.offsets, shapes.row_major(shape), strict=True))


def _is(value: Any, classes: tuple[str, ...]) -> bool:
    """Whether an inert value was made by one of these classes or functions."""
    return isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.dotted in classes


def _is_plain(value: Any) -> bool:
    """Whether a value cannot change, so that two entries may be one object."""
    if isinstance(value, tuple):
        return all(item is None or isinstance(item, bool | int | float | str) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def _is_optimizer(name: object) -> bool:
    return isinstance(name, str) and name.startswith("optim")


def _tree(path: Path, leaves: Mapping[str, Any], ways: Mapping[str, Way], budget: limits.Budget) -> dict[str, Any]:
    """The nested dicts and lists that were saved. What an optimizer says of itself comes last.

    A way may name any number of a list, and those before it are made.
    """
    tree: dict[str, Any] = {}
    for name, way in sorted(ways.items(), key=lambda item: _is_optimizer(item[1][0])):
        container: Any = tree
        for step, below in itertools.zip_longest(way, way[1:]):
            if isinstance(container, list) and isinstance(step, int):
                missing = max(step + 1 - len(container), 0)
                budget.spend(missing, name)
                container.extend([None] * missing)
                found = container[step]
            elif isinstance(container, dict) and isinstance(step, str):
                found = container.get(step)
            else:
                raise FileFormatError(f"{path} is damaged: {name} lies inside another entry")
            if below is None:
                if found is not None:
                    raise FileFormatError(f"{path} is damaged: two entries have the place of {name}")
                container[step] = leaves[name]
            elif found is None:
                container[step] = {} if isinstance(below, str) else []
                container = container[step]
            else:
                container = found
    return tree


def _chosen(folder: Path, tree: dict[str, Any], key: str | None) -> tuple[dict[str, Any], str | None, tuple[str, ...]]:
    """The tree to take the state dict from, its key where it has to be given, and what to tell of the choice.

    Two layouts are common in such folders alone: a model's tensors at the top with the state of training below, and
    a model and its optimizer inside one object that stands for the application.
    """
    if key is not None or _model_in(tree) is not None:
        return tree, key, ()
    below = [name for name, value in tree.items() if isinstance(value, dict) and not name.endswith("_extra_state")]
    if below and any(isinstance(value, TensorEntry) for value in tree.values()):
        own = {name: value for name, value in tree.items() if name not in below}
        names = listed(below, 6)
        return own, None, (f"took the tensors at the top of {folder.name} and left out {names}; --key takes another",)
    if len(below) == 1 and (name := _model_in(tree[below[0]])) is not None:
        key = f"{below[0]}.{name}"
        return tree, key, (f"took the state dict under {key!r} of {folder.name}",)
    return tree, None, ()


def _model_in(tree: Mapping[str, Any]) -> str | None:
    """The usual name under which a dict keeps a state dict."""
    return next((name for name in state_dicts.STATE_DICT_KEYS if isinstance(tree.get(name), dict)), None)
