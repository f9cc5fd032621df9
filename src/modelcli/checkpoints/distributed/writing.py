"""Write folders of `torch.distributed.checkpoint`, as its `save` writes them from one process.

The pickle `.metadata` states where each part of each tensor is. The files `__0_N.distcp` hold the parts: each tensor
whole, as an archive of `torch.save`, and each other value so. Nested dicts, and lists with tensors or dicts in them,
are flattened as torch's `flatten_state_dict` does: `optimizer.state.0.exp_avg`. torch reads such a folder into models
that are sharded in any way: each rank reads what it needs of a tensor.

modelcli's record has no place in the format, so it is a file beside the others, with the digest of the `.metadata` that
it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcli.checkpoints import formats
from modelcli.checkpoints.distributed import reading
from modelcli.checkpoints.distributed.names import METADATA, RANK_SUFFIX, RECORD
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.layout import (
    LARGE,
    PAGE,
    BytesLayout,
    CopyLayout,
    FolderLayout,
    Layout,
    Output,
    notes_on_larger,
)
from modelcli.checkpoints.plan import Plan, PlannedTensor, Source
from modelcli.checkpoints.torch_pickle import pickling, state_dicts
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque
from modelcli.checkpoints.torch_pickle.writing import archive, with_value_at
from modelcli.checkpoints.zip_archives.layout import ALIGNMENT, ZipLayout
from modelcli.errors import FileFormatError, RequestError, SystemFailureError
from modelcli.model.tensors import Shape
from modelcli.wording import listed

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
#: The version that torch 2.8 and later write; earlier ones write none and ignore it.
_VERSION = "1.0.0"

#: The names and indices that lead to a value in the nested dicts and lists, as `planner_data` has them.
KeyPath = tuple[str | int, ...]


def layout(plan: Plan, max_bytes: int) -> FolderLayout:
    """Return the layout of a folder with at most `max_bytes` of tensors in a file; a larger tensor has one to itself.

    Raises RequestError for what the format cannot hold: sparse and quantized tensors, and names that are the same when
    they are flattened.
    """
    whole = plan.entries if plan.key is None else with_value_at(plan.tree, plan.key, plan.entries)
    flat, empty = _flattened(whole)
    prefix = () if plan.key is None else plan.key
    first = {(*prefix, name): (*prefix, original) for name, original in plan.first_names.items()}
    files: dict[str, Layout] = {name: CopyLayout(source) for name, source in (plan.companions or {}).items()}
    places: dict[KeyPath, _Place] = {}
    for number, group in enumerate(_cut(flat, first, max_bytes)):
        name = f"__0_{number}{RANK_SUFFIX}"
        archives: list[tuple[int, ZipLayout]] = []
        end = 0
        for key_path in group:
            made = archive(flat[key_path])
            start = end + -end % (PAGE if made.nbytes >= LARGE else ALIGNMENT)
            end = start + made.nbytes
            archives.append((start, made))
            places[key_path] = _Place(name, start, made.nbytes)
        files[name] = ArchivesLayout(archives, end)
    metadata = pickling.dumps(_metadata(flat, first, places), _no_storage)
    if plan.record:
        document = {"metadata": hashlib.sha256(metadata).hexdigest(), "record": plan.record}
        files[RECORD] = BytesLayout(json.dumps(document).encode() + b"\n")
    files[METADATA] = BytesLayout(metadata)
    notes = [f"torch.distributed.checkpoint holds no empty dicts: {listed(empty, 4)} left out"] if empty else []
    written = ((key_path, flat[key_path]) for key_path in places)
    sizes = {_flat_name(path): value.source.nbytes for path, value in written if isinstance(value, PlannedTensor)}
    return FolderLayout(files, (*notes, *notes_on_larger(sizes, max_bytes)))


def verify(plan: Plan, layout: FolderLayout, path: Path) -> None:
    """Read the folder back and compare it with the plan. Raises SystemFailureError where it is not what was written."""
    written = b"".join(bytes(chunk) for _, source in layout.files[METADATA].parts() for chunk in source.chunks())
    if (path / METADATA).read_bytes() != written:
        raise SystemFailureError(f"what was read back from {METADATA} is not what was written; nothing was changed")
    try:
        contents = reading.read(path / METADATA, state_dicts.key_of(plan.key) if plan.key else None)
    except FileFormatError as error:
        raise SystemFailureError(f"what was read back is damaged; nothing was changed: {error.message}") from None
    found = {name: (entry.shape, entry.dtype) for name, entry in contents.tensors.items()}
    if found != {name: (tensor.shape, tensor.dtype) for name, tensor in plan.tensors.items()}:
        raise SystemFailureError(f"what was read back from {path} is not what was written; nothing was changed")


def superseded(folder: Path) -> set[str]:
    """Return the names of the files in a folder that give way to the checkpoint that is written there."""
    names = {entry.name for entry in folder.iterdir()}
    if METADATA in names:
        return own_files(names)
    return formats.checkpoint_files(folder, names)


def own_files(names: Iterable[str]) -> set[str]:
    """Return those of the names that files of this format have."""
    return {name for name in names if name in (METADATA, RECORD) or name.endswith(RANK_SUFFIX)}


@dataclass(frozen=True)
class ArchivesLayout:
    """The layout of a file with archives one behind the other, each with its offset."""

    archives: list[tuple[int, ZipLayout]]
    nbytes: int

    def parts(self) -> Iterator[tuple[int, Source]]:
        return ((start + offset, source) for start, made in self.archives for offset, source in made.parts())

    def write(self, output: Output) -> None:
        for start, made in self.archives:
            made.write(_Shifted(output, start))


@dataclass(frozen=True)
class _Shifted:
    """The part of a file behind an offset."""

    output: Output
    start: int

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self.output.write(self.start + offset, data)

    def put(self, offset: int, source: Source) -> None:
        self.output.put(self.start + offset, source)

    def put_with_checksum(self, offset: int, source: Source) -> int:
        return self.output.put_with_checksum(self.start + offset, source)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an archive is: the file, and the bytes in it."""

    file: str
    offset: int
    length: int


# --- what is written -------------------------------------------------------------------------------------------------


def _flattened(tree: Mapping[Any, Any]) -> tuple[dict[KeyPath, Any], list[str]]:
    """Return the values in nested dicts and lists by their key paths, and the paths of the empty dicts among them.

    As in torch's `flatten_state_dict`, keys become texts, a list is followed if a tensor or a dict is in it, and other
    values are whole.
    """
    flat: dict[KeyPath, Any] = {}
    empty: list[str] = []
    names: dict[str, KeyPath] = {}

    def visit(key_path: KeyPath, value: Any) -> None:
        if isinstance(value, dict):
            if not value:
                empty.append(_flat_name(key_path))
            for key, item in value.items():
                visit((*key_path, str(key)), item)
        elif isinstance(value, list) and not _is_whole(value):
            for index, item in enumerate(value):
                visit((*key_path, index), item)
        else:
            name = _flat_name(key_path)
            if (other := names.setdefault(name, key_path)) != key_path:
                raise RequestError(
                    f"{key_path} and {other} would both be {name!r} in a folder of torch.distributed.checkpoint",
                    f"rename one of them, or {formats.instead()}",
                )
            if isinstance(value, CompositeEntry):
                raise RequestError(
                    f"{name} is a tensor of layout {value.layout} and dtype {value.dtype}, and "
                    "torch.distributed.checkpoint holds dense tensors only",
                    f"{formats.instead()}, or remove {name}",
                )
            flat[key_path] = value

    for key, value in tree.items():
        visit((str(key),), value)
    return flat, empty


def _is_whole(values: list[Any]) -> bool:
    """Whether a list is one value: no tensor, dict, or list with such in it is among its items."""
    for item in values:
        if isinstance(item, dict | PlannedTensor | TensorEntry | CompositeEntry):
            return False
        if isinstance(item, list) and not _is_whole(item):
            return False
    return True


def _flat_name(key_path: KeyPath) -> str:
    return ".".join(map(str, key_path))


def _cut(flat: Mapping[KeyPath, Any], first: Mapping[Any, Any], max_bytes: int) -> list[list[KeyPath]]:
    """Return the key paths of each file. A tensor with several names is in it under the first one."""
    groups: list[list[KeyPath]] = [[]]
    size = 0
    for key_path, value in flat.items():
        if first.get(key_path, key_path) != key_path:
            continue
        nbytes = value.source.nbytes if isinstance(value, PlannedTensor) else 0
        if groups[-1] and size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(key_path)
        size += nbytes
    return groups


# --- .metadata -------------------------------------------------------------------------------------------------------


def _metadata(flat: Mapping[KeyPath, Any], first: Mapping[Any, Any], places: Mapping[KeyPath, _Place]) -> Opaque:
    """Return the object in `.metadata`: a `torch.distributed.checkpoint.metadata.Metadata`."""
    properties: dict[str, Opaque] = {}
    state_dict_metadata: dict[str, Opaque] = {}
    storage_data: list[tuple[Opaque, Opaque]] = []
    for key_path, value in flat.items():
        name = _flat_name(key_path)
        if isinstance(value, PlannedTensor):
            if (described := properties.get(value.dtype)) is None:
                described = properties[value.dtype] = _properties(value.dtype)
            size, offsets = _size(value.shape), _size((0,) * len(value.shape))
            chunk = _instance("ChunkStorageMetadata", {"offsets": offsets, "sizes": size})
            fields = {"properties": described, "size": size, "chunks": [chunk]}
            state_dict_metadata[name] = _instance("TensorStorageMetadata", fields)
            index = _instance("MetadataIndex", {"fqn": name, "offset": offsets, "index": 0})
        else:
            state_dict_metadata[name] = _instance("BytesStorageMetadata", None)
            index = _instance("MetadataIndex", {"fqn": name, "offset": None, "index": None})
        place = places[first.get(key_path, key_path)]
        info = {"relative_path": place.file, "offset": place.offset, "length": place.length}
        storage_data.append((index, _instance("_StorageInfo", info, "torch.distributed.checkpoint.filesystem")))
    return _instance(
        "Metadata",
        {
            "state_dict_metadata": state_dict_metadata,
            "planner_data": {_flat_name(key_path): key_path for key_path in flat},
            "storage_data": dict(storage_data),
            "storage_meta": None,
            "version": _VERSION,
        },
    )


def _properties(dtype: str) -> Opaque:
    """Return the `TensorProperties` of a tensor on the CPU, whose state is a tuple."""
    layout = Opaque(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Opaque(Global(_METADATA_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    return _instance("TensorProperties", (Global("torch", dtype), layout, False, contiguous, False))


def _size(shape: Shape) -> Opaque:
    return Opaque(Global("torch", "Size"), (shape,))


def _instance(name: str, state: Any, module: str = _METADATA_MODULE) -> Opaque:
    return Opaque(Global(module, name), (), state, how="newobj")


def _no_storage(_source: Source, _dtype: str | None) -> tuple[str, int]:
    raise AssertionError("the description of a folder has no tensors")
