"""Read the files that ranks saved with `torch.save`, and put the tensors together that each has a part of.

A DTensor states the place of its rank in the mesh of devices and how the mesh splits it; a ShardedTensor states the
offsets of its parts. No object is made: the places are read from the inert values of the pickles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from modelcli.checkpoints import limits, shapes
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.distributed import blocks
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.rank_files.names import sets_in
from modelcli.checkpoints.storage import Storage
from modelcli.checkpoints.torch_pickle import pickles, state_dicts
from modelcli.checkpoints.torch_pickle.allow_list import SHARDED_CLASSES
from modelcli.checkpoints.torch_pickle.embedded import Reordered
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, sizes_in
from modelcli.checkpoints.torch_pickle.pickled_files import pickle_of
from modelcli.errors import FileFormatError, RequestError, SystemFailureError, did_you_mean
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Shape
from modelcli.wording import brief_repr, counted, is_or_are, listed

#: The classes that describe where the parts are, and the packages in which versions of torch have them.
_DESCRIBING = frozenset(
    {
        *("DTensor", "DTensorSpec", "TensorMeta", "ShardOrderEntry", "DeviceMesh", "_MeshLayout", "_FlatLayout"),
        *("Shard", "Replicate", "Partial", "_Partial", "_StridedShard", "ShardedTensor", "ShardMetadata"),
        *("ShardedTensorMetadata", "TensorProperties", "MEM_FORMAT_ENCODING", "ChunkShardingSpec", "_remote_device"),
        *("EnumerableShardingSpec", "ProcessGroupState"),
    }
)
_PACKAGES = (
    *("torch.distributed.tensor.", "torch.distributed._tensor.", "torch.distributed.device_mesh."),
    *("torch.distributed._mesh_layout.", "torch.distributed._shard.", "torch.distributed.remote_device."),
)
_SAVE_SHARDED = (
    "in the program that made it, use torch.distributed.checkpoint.save(state_dict, checkpoint_id=folder), and name "
    "the folder"
)


def read(path: Path, key: str | None) -> Contents:
    """Read the files of all ranks beside one of them.

    Args:
        path: the file of a rank.
        key: the state dict in the files, `a.b` for one inside another; None to find it.

    Raises:
        RequestError: the files hold no parts of tensors, or nothing of that key.
        FileFormatError: files are missing, or do not agree.
    """
    folder = path.parent
    try:
        sets = sets_in(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise SystemFailureError(f"cannot read {folder}: {error.strerror or error}") from None
    (files,) = (found for found in sets.values() if path.name in found.values())
    paths = [folder / files[rank] for rank in sorted(files)]
    ranks = [_Rank(at, pickle_of(Candidate(at))) for at in paths]
    keys = _keys_of(ranks[0], key)
    state_dicts_ = [_state_dict(rank, keys) for rank in ranks]
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    left_out, whole = [], 0
    for name, value in state_dicts_[0].items():
        if not isinstance(name, str):
            raise FileFormatError.damaged(str(path), f"the name of a tensor is {brief_repr(name)}, not a text")
        if _is_sharded(value):
            tensors[name] = _joined(name, ranks, [state_dict.get(name) for state_dict in state_dicts_])
        elif isinstance(value, TensorEntry):
            _require_whole(name, value, ranks, state_dicts_)
            tensors[name] = value
            whole += 1
        else:
            left_out.append(name)
    _require_no_others(ranks, state_dicts_)
    limits.check_names(tensors, str(folder))
    foreign = dict.fromkeys(name for rank in ranks for name in rank.pickled.foreign if not _is_expected(name))
    notes = [f"{counted(len(tensors), 'tensor')} from the files of {counted(len(ranks), 'rank')} in {folder.name}"]
    if keys:
        notes.append(f"took the state dict under {state_dicts.key_of(keys)!r} of each")
    if whole:
        notes.append(f"{counted(whole, 'tensor')} {is_or_are(whole)} not split: taken from {ranks[0].path.name}")
    if left_out:
        notes.append(f"{listed(left_out, 4)} {is_or_are(len(left_out))} left out: no plain tensors")
    return Contents(folder, "rank_files", tensors, foreign=tuple(foreign), notes=tuple(notes), unseen=tuple(left_out))


@dataclass(frozen=True)
class _Rank:
    """The file of a rank, and its content."""

    path: Path
    pickled: pickles.Pickle

    def damaged(self, what: str) -> FileFormatError:
        return FileFormatError.damaged(str(self.path), what)


def _is_expected(name: str) -> bool:
    """Whether a foreign name only describes the parts of tensors."""
    return name.startswith(_PACKAGES) and name.rpartition(".")[2] in _DESCRIBING


# --- the state dict ------------------------------------------------------------------------------------------------


def _keys_of(rank: _Rank, key: str | None) -> tuple[str, ...]:
    """Return the keys that lead to the state dict in the file of the first rank."""
    value = rank.pickled.value
    if key is not None:
        return _named(rank, key)
    found = _paths_to_parts(value)
    if not found:
        raise RequestError(
            f"{rank.path.parent} is a folder without an index of shards, and {rank.path.name} in it holds no parts of "
            "tensors (DTensor or ShardedTensor)",
            f"name a file in it: {rank.path}",
        )
    usual = [keys for keys in found if keys and keys[-1] in state_dicts.STATE_DICT_KEYS]
    if len(found) == 1 or found[0] == ():
        return found[0]
    if len(usual) == 1:
        return usual[0]
    raise RequestError(
        f"{rank.path} contains {len(found)} dicts of parts of tensors, and modelcli cannot tell which to use",
        f"name one: {listed([f'--key {state_dicts.key_of(keys)}' for keys in found], 8)}",
    )


def _paths_to_parts(value: Any) -> list[tuple[str, ...]]:
    """Return the keys of the dicts that hold parts of tensors, those of optimizers left out."""
    found: list[tuple[str, ...]] = []
    level: list[tuple[tuple[str, ...], Any]] = [((), value)]
    seen: set[int] = set()
    for _ in range(4):
        deeper = []
        for keys, here in level:
            if not isinstance(here, dict) or id(here) in seen:
                continue
            seen.add(id(here))
            if any(map(_is_sharded, here.values())):
                found.append(keys)
                continue
            deeper += [
                ((*keys, name), item)
                for name, item in here.items()
                if isinstance(name, str) and isinstance(item, dict) and not name.startswith(("optim", "rng"))
            ]
        level = deeper
    return found


def _named(rank: _Rank, key: str) -> tuple[str, ...]:
    """Return the keys of the value of `--key`. A key may contain dots, so the longest one is tried first."""
    keys: tuple[str, ...] = ()
    value, rest = rank.pickled.value, key
    while rest:
        words = rest.split(".")
        steps = (".".join(words[:count]) for count in range(len(words), 0, -1))
        step = next((step for step in steps if isinstance(value, dict) and step in value), None)
        if step is None:
            names = [name for name in value if isinstance(name, str)] if isinstance(value, dict) else []
            hint = did_you_mean(words[0], names) or (f"there are: {listed(names, 8)}" if names else None)
            raise RequestError(f"no key {key!r} in {rank.path}", hint)
        keys, value, rest = (*keys, step), value[step], rest[len(step) + 1 :]
    return keys


def _state_dict(rank: _Rank, keys: Sequence[str]) -> Mapping[Any, Any]:
    value = rank.pickled.value
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, dict):
        where = state_dicts.key_of(tuple(keys))
        raise rank.damaged(f"it has no state dict under {where!r}" if keys else "it should be a state dict")
    flat = next((name for name in value if isinstance(name, str) and _is_flat(name)), None)
    if flat is not None and (_is_sharded(value[flat]) or len(keys) == 0):
        raise FileFormatError(
            f"{rank.path} has {flat}, a flat parameter of FSDP (LOCAL_STATE_DICT): the files do not say which tensors "
            "are in it",
            "save with StateDictType.SHARDED_STATE_DICT or FULL_STATE_DICT in the program that made it",
        )
    return value


def _require_whole(
    name: str, entry: TensorEntry, ranks: Sequence[_Rank], state_dicts_: Sequence[Mapping[Any, Any]]
) -> None:
    """Raise FileFormatError if another rank has something else than the first one, which has a tensor as a whole."""
    for rank, state_dict in zip(ranks, state_dicts_, strict=True):
        other = state_dict.get(name, entry)
        if not isinstance(other, TensorEntry) or (other.shape, other.dtype) != (entry.shape, entry.dtype):
            found = f"{other.dtype} {list(other.shape)}" if isinstance(other, TensorEntry) else "no whole tensor"
            raise FileFormatError(
                f"{rank.path} has {found} as {name}, and {ranks[0].path.name} has {entry.dtype} {list(entry.shape)}: "
                "the files do not say how they belong together",
                _SAVE_SHARDED,
            )


def _require_no_others(ranks: Sequence[_Rank], state_dicts_: Sequence[Mapping[Any, Any]]) -> None:
    """Raise FileFormatError if a rank has tensors that the first one lacks, as the stages of a pipeline have."""
    for rank, state_dict in zip(ranks, state_dicts_, strict=True):
        for name, value in state_dict.items():
            if name not in state_dicts_[0] and (isinstance(value, TensorEntry) or _is_sharded(value)):
                raise FileFormatError(
                    f"{rank.path} has {brief_repr(name)}, which {ranks[0].path.name} does not have: modelcli joins "
                    "files of ranks that all have the same tensors",
                    _SAVE_SHARDED,
                )


def _is_flat(name: str) -> bool:
    return name.rpartition(".")[2] in ("_flat_param", "flat_param")


# --- parts of tensors ----------------------------------------------------------------------------------------------


def _is_sharded(value: Any) -> bool:
    return state_dicts.is_sharded(_without_parameter(value))


def _without_parameter(value: Any) -> Any:
    """Return the tensor in a Parameter, as the calls that make it; any other value unchanged."""
    if _is_a(value, "_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter") and value.args:
        return value.args[0]
    return value


def _is_a(value: Any, *names: str) -> bool:
    """Whether an object was made by a class or function with one of these names, in any module."""
    return (
        isinstance(value, Opaque)
        and isinstance(value.call, Global)
        and value.call.name in names
        and isinstance(value.args, tuple)
    )


@dataclass(frozen=True)
class _Part:
    """What the file of a rank says of a tensor.

    Attributes:
        shape: the shape of the whole tensor.
        splits: how each dimension of the mesh splits it: the dimension of the tensor; None where it is the same.
        place: the place of the rank in the mesh.
        tensor: the part of the rank.
        ranks: how many ranks there are, if the file says it.
    """

    shape: Shape
    splits: tuple[int | None, ...]
    place: tuple[int, ...]
    tensor: TensorEntry
    ranks: int | None


def _joined(name: str, ranks: Sequence[_Rank], values: Sequence[Any]) -> TensorEntry:
    """Return a tensor of which each rank has a part."""
    found: list[blocks.Block] = []
    values = [_without_parameter(value) for value in values]
    for rank, value in zip(ranks, values, strict=True):
        if not _is_sharded(value):
            raise rank.damaged(f"it has no part of {name}, which {ranks[0].path.name} has")
    if all(_class_of(value) == "DTensor" for value in values):
        parts = [_dtensor(rank, name, value) for rank, value in zip(ranks, values, strict=True)]
        shape, dtype = parts[0].shape, parts[0].tensor.dtype
        for rank, part in zip(ranks, parts, strict=True):
            if (part.shape, part.tensor.dtype, part.splits) != (shape, dtype, parts[0].splits):
                raise rank.damaged(f"its part of {name} is of another tensor than that in {ranks[0].path.name}")
            _require_all(rank, part.ranks, ranks)
        found = _blocks_of_mesh(name, ranks, parts)
    else:
        shape, dtype = _sharded_shape(ranks[0], name, values[0]), ""
        for rank, value in zip(ranks, values, strict=True):
            if _class_of(value) == "DTensor" or _sharded_shape(rank, name, value) != shape:
                raise rank.damaged(f"its part of {name} is of another tensor than that in {ranks[0].path.name}")
            _require_group(rank, name, value, ranks)
            for offsets, tensor in _shards(rank, name, value):
                dtype = dtype or tensor.dtype
                if tensor.dtype != dtype:
                    raise rank.damaged(f"its part of {name} is {tensor.dtype}, but another is {dtype}")
                found.append(blocks.Block(offsets, tensor.shape, _bytes_of(tensor)))
    return _of_blocks(name, ranks[0], shape, dtype, found)


def _of_blocks(name: str, rank: _Rank, shape: Shape, dtype: str, found: Sequence[blocks.Block]) -> TensorEntry:
    filled = [block for block in found if 0 not in block.sizes] or [*found[:1]]
    inside = all(
        offset + size <= whole
        for block in filled
        for offset, size, whole in zip(block.offsets, block.sizes, shape, strict=True)
    )
    if not filled or not inside or (0 not in shape and not blocks.cover_once(shape, filled, rank.pickled.budget)):
        raise FileFormatError.damaged(
            str(rank.path.parent), f"the parts of {name} do not cover its shape {list(shape)} exactly once"
        )
    storage = blocks.joined(shape, ITEM_BYTES[dtype], filled)
    return TensorEntry(shape, dtype, shapes.row_major(shape), 0, storage)


def _class_of(value: Opaque) -> str:
    """Return the name of the class of a part: it is an argument of the function that makes it."""
    kinds = (arg for arg in (value.call, *value.args[:3]) if isinstance(arg, Global) and arg.dotted in SHARDED_CLASSES)
    return next(kinds).name


def _require_all(rank: _Rank, stated: int | None, ranks: Sequence[_Rank]) -> None:
    if stated is not None and stated != len(ranks):
        raise FileFormatError(
            f"{rank.path} says that there are {counted(stated, 'rank')}, but {rank.path.parent} has the files of "
            f"{len(ranks):,}",
            "copy the files of all ranks into it, and none of another run",
        )


def _bytes_of(entry: TensorEntry) -> Storage:
    """Return the bytes of a part in row-major order."""
    item = ITEM_BYTES[entry.dtype]
    reach = shapes.extent(entry.shape, entry.stride) * item
    span = entry.storage.part(entry.offset * item, reach)
    if reach == prod(entry.shape) * item and shapes.is_row_major(entry.shape, entry.stride):
        return span
    return Reordered(span, entry.shape, entry.stride, item)


def _fields(rank: _Rank, value: Any, what: str) -> Mapping[str, Any]:
    """Return the attributes of an object."""
    state = value.state if isinstance(value, Opaque) else None
    if isinstance(state, tuple) and len(state) == 2:  # of a class with slots
        state = {**(state[0] or {}), **(state[1] or {})} if all(isinstance(s, dict | None) for s in state) else None
    if not isinstance(state, dict):
        raise rank.damaged(f"it does not describe {what}")
    return state


def _sizes(rank: _Rank, what: str, value: Any, checked: Callable[[Any, str], Shape] = shapes.shape) -> Shape:
    try:
        return checked(sizes_in(value), f"{rank.path}: {what}")
    except (ValueError, TypeError) as error:
        raise rank.damaged(f"the shape or place of {what} is wrong: {error}") from None


# --- DTensor -------------------------------------------------------------------------------------------------------


def _dtensor(rank: _Rank, name: str, value: Opaque) -> _Part:
    """Read what a pickled DTensor says: `_rebuild_from_type_v2(_rebuild_wrapper_subclass, class, arguments, state)`."""
    if not _is_a(value, "_rebuild_from_type_v2") or len(value.args) != 4:
        raise rank.damaged(f"{name} is a DTensor that was not saved by torch.save")
    arguments, state = value.args[2:]
    state = state[1] if isinstance(state, tuple) and len(state) == 2 and state[0] is None else state
    if not isinstance(arguments, tuple) or len(arguments) < 3 or not isinstance(state, dict):
        raise rank.damaged(f"{name} is a DTensor that was not saved by torch.save")
    shape = _sizes(rank, name, arguments[2])
    tensor = _plain(rank, name, state.get("_local_tensor"), len(shape))
    spec = _fields(rank, state.get("_spec"), f"the placement of {name}")
    placements = spec.get("placements")
    if not isinstance(placements, tuple | list):
        raise rank.damaged(f"it does not state the placements of {name}")
    splits = tuple(_split(rank, name, placement, len(shape)) for placement in placements)
    order = spec.get("shard_order")
    if isinstance(order, tuple) and not all(_is_in_order(entry) for entry in order):
        raise _unusual(rank, name, "in an order of its own")
    mesh = _fields(rank, spec.get("mesh"), f"the mesh of devices of {name}")
    place = mesh.get("_coordinate_on_dim")
    if place is None:
        raise FileFormatError(f"{rank.path}: the place of this rank in the mesh of {name} is not stated", _SAVE_SHARDED)
    place = _sizes(rank, f"the rank in the mesh of {name}", place, shapes.sizes)
    if len(place) != len(splits):
        raise rank.damaged(f"{name} has {len(splits)} placements on a mesh of {len(place)} dimensions")
    numbers = mesh.get("_rank_map", mesh.get("mesh"))
    count = prod(numbers.shape) if isinstance(numbers, TensorEntry) else None
    return _Part(shape, splits, place, tensor, count)


def _split(rank: _Rank, name: str, placement: Any, dimensions: int) -> int | None:
    """Return the dimension along which a placement splits a tensor, None if each rank has the same."""
    if _is_a(placement, "Replicate"):
        return None
    if not _is_a(placement, "Shard"):
        what = (
            placement.call.name if isinstance(placement, Opaque) and isinstance(placement.call, Global) else "unknown"
        )
        raise _unusual(rank, name, f"as {what}")
    state = placement.state if isinstance(placement.state, dict) else {}
    dim = state.get("dim", placement.args[0] if placement.args else None)
    if type(dim) is not int or not 0 <= dim < dimensions:
        raise rank.damaged(f"{name} is split along dimension {brief_repr(dim)}, and it has {dimensions}")
    return dim


def _is_in_order(entry: Any) -> bool:
    """Whether the dimensions of the mesh that split a dimension of a tensor do it in their order."""
    mesh = entry.args[1] if isinstance(entry, Opaque) and isinstance(entry.args, tuple) and len(entry.args) == 2 else ()
    return isinstance(mesh, tuple) and all(isinstance(dim, int) for dim in mesh) and list(mesh) == sorted(mesh)


def _unusual(rank: _Rank, name: str, how: str) -> FileFormatError:
    return FileFormatError(
        f"{rank.path}: {name} is placed on the ranks {how}, which modelcli does not join", _SAVE_SHARDED
    )


def _plain(rank: _Rank, name: str, value: Any, dimensions: int) -> TensorEntry:
    if not isinstance(value, TensorEntry) or len(value.shape) != dimensions:
        raise rank.damaged(f"its part of {name} is not a dense tensor of {counted(dimensions, 'dimension')}")
    return replace(value, requires_grad=None, is_parameter=False)


def _place(number: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the place in a mesh of these sizes that is counted last dimension first. (A file may state any sizes.)"""
    place = []
    for size in reversed(sizes):
        number, index = divmod(number, size)
        place.append(index)
    return tuple(reversed(place))


def _blocks_of_mesh(name: str, ranks: Sequence[_Rank], parts: Sequence[_Part]) -> list[blocks.Block]:
    """Return the parts of the ranks that differ, each with its offsets.

    A dimension of the mesh cuts a dimension of a tensor as `torch.chunk` does: into equal parts, of which the last
    ones may be smaller or empty. Ranks that differ only in a dimension that cuts nothing have the same.
    """
    first = parts[0]
    mesh = tuple(1 + max(part.place[axis] for part in parts) for axis in range(len(first.splits)))
    cutting = [axis for axis, split in enumerate(first.splits) if split is not None]
    by_place: dict[tuple[int, ...], tuple[_Rank, _Part]] = {}
    for rank, part in zip(ranks, parts, strict=True):
        by_place.setdefault(tuple(part.place[axis] for axis in cutting), (rank, part))
    wanted = prod(mesh[axis] for axis in cutting)
    if len(by_place) != wanted:
        rank = ranks[0]
        sizes_of_mesh = [mesh[axis] for axis in cutting]
        places_of_mesh = (_place(number, sizes_of_mesh) for number in itertools.count())
        missing = next(place for place in places_of_mesh if place not in by_place)
        raise FileFormatError(
            f"{rank.path.parent} has no file of a rank with the part of {name} at {list(missing)} of the mesh",
            "copy the files of all ranks into it",
        )
    found = []
    for place, (rank, part) in by_place.items():
        offsets, sizes = [0] * len(part.shape), [*part.shape]
        for axis, at in zip(cutting, place, strict=True):
            dim = part.splits[axis]
            assert dim is not None
            step = -(-sizes[dim] // mesh[axis])
            start = min(at * step, sizes[dim])
            offsets[dim], sizes[dim] = offsets[dim] + start, min(step, sizes[dim] - start)
        if part.tensor.shape != tuple(sizes):
            raise rank.damaged(
                f"its part of {name} has the shape {list(part.tensor.shape)}, but should have {sizes}: "
                f"{list(part.shape)} on a mesh of {' x '.join(map(str, mesh))}"
            )
        found.append(blocks.Block(tuple(offsets), tuple(sizes), _bytes_of(part.tensor)))
    return found


# --- ShardedTensor -------------------------------------------------------------------------------------------------


def _sharded_state(rank: _Rank, name: str, value: Opaque) -> tuple[Any, ...]:
    """Return the state of a pickled ShardedTensor: its parts, metadata, process group, specification and the rest."""
    state = value.args[3] if _is_a(value, "_rebuild_from_type_v2") and len(value.args) == 4 else value.state
    if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[0], list):
        raise rank.damaged(f"{name} is a ShardedTensor that was not saved by torch.save")
    return state


def _sharded_shape(rank: _Rank, name: str, value: Opaque) -> Shape:
    metadata = _fields(rank, _sharded_state(rank, name, value)[1], f"the shape of {name}")
    return _sizes(rank, name, metadata.get("size"))


def _require_group(rank: _Rank, name: str, value: Opaque, ranks: Sequence[_Rank]) -> None:
    """Raise FileFormatError unless the files are those of the group of ranks that have the parts of a tensor.

    Where there are several such groups (HYBRID_SHARD of FSDP1, or experts), the files do not say whether they have the
    same values, so the files of one group are read, and those of several are not.
    """
    state = _sharded_state(rank, name, value)
    of_group = state[2].state if len(state) > 2 and isinstance(state[2], Opaque) else None
    stated = of_group if isinstance(of_group, dict) else {}
    size, world = stated.get("local_world_size"), stated.get("global_world_size")
    if type(size) is int and type(world) is int and 0 < size < world and size != len(ranks):
        raise FileFormatError(
            f"{rank.path} says that its part of {name} is one of {size:,}, of {counted(world, 'rank')}: several groups "
            "of ranks have parts of it, as in HYBRID_SHARD of FSDP, and the files do not say that these are the same",
            f"if they are, put the files of one group, such as ranks 0 to {size - 1:,}, into a folder of their own, "
            "and name it",
        )
    _require_all(rank, size if type(size) is int else None, ranks)


def _shards(rank: _Rank, name: str, value: Opaque) -> list[tuple[Shape, TensorEntry]]:
    """Return the parts of a rank, each with its offsets."""
    shape, found = _sharded_shape(rank, name, value), []
    for shard in _sharded_state(rank, name, value)[0]:
        fields = _fields(rank, shard, f"a part of {name}")
        metadata = _fields(rank, fields.get("metadata"), f"the place of a part of {name}")
        offsets = _sizes(rank, name, metadata.get("shard_offsets"), shapes.sizes)
        tensor = _plain(rank, name, fields.get("tensor"), len(shape))
        if len(offsets) != len(shape):
            raise rank.damaged(f"a part of {name} has {len(offsets)} offsets, but {name} has {len(shape)} dimensions")
        found.append((offsets, tensor))
    return found
