"""Read a folder of shards by its index, `*.index.json`, which states which file has which tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelcli.checkpoints import formats, limits, named_files, record_reading, strict_json
from modelcli.checkpoints import record as records
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.sharded.names import INDEX_SUFFIX
from modelcli.errors import FileFormatError, RequestError, SystemFailureError
from modelcli.files.open_folder import read_regular
from modelcli.wording import counted, listed


def index_in(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the index of a folder, or None if it has none. `names` are the names of its files.

    Raises RequestError if the folder holds several checkpoints; the hint names them.
    """
    found = [name for name in names if name.endswith(INDEX_SUFFIX)]
    whole = [name for name in names if name in formats.whole_files()]
    if found and whole:  # programs differ in which of them they load
        choices = listed([str(folder / name) for name in (*found, *whole)], 6)
        raise RequestError(
            f"{folder} holds two checkpoints: an index of shards, and {whole[0]}", f"name one of {choices}"
        )
    if len(found) > 1:
        raise RequestError(f"{folder} holds {len(found)} indexes of shards", f"name one of {listed(found, 6)}")
    return folder / found[0] if found else None


def read(index: Path) -> Contents:
    """Read an index and the headers of the shards that it names. Raises FileFormatError if they do not match."""
    weight_map, metadata = index_of(index)
    # An index may spell a file in several ways. Each file is read once, and the disk is not asked for each tensor.
    shards: dict[Path, Contents] = {}
    by_spelling: dict[str, Contents] = {}
    homes = named_files.homes_of(index)
    for file in dict.fromkeys(weight_map.values()):
        path = named_files.inside(index, file, homes)
        real = path.resolve()
        if real not in shards:
            shards[real] = _shard(path)
        by_spelling[file] = shards[real]
    return joined(index, weight_map, metadata, by_spelling)


def joined(
    index: Path, weight_map: Mapping[str, str], metadata: Mapping[str, Any], by_spelling: Mapping[str, Contents]
) -> Contents:
    """Join shards into the checkpoint that their index describes.

    Args:
        index: the index, for messages.
        weight_map: the file that it names for each key.
        metadata: its metadata.
        by_spelling: the shard for each file, as the index spells it.

    Raises FileFormatError if the index and the shards do not match.
    """
    shards = {shard.path: shard for shard in by_spelling.values()}
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    for name, file in weight_map.items():
        shard = by_spelling[file]
        if (entry := shard.tensors.get(name)) is not None:
            tensors[name] = entry
        elif name not in shard.extras:
            raise FileFormatError.damaged(str(index), f"it lists {name} in {file}, but that file does not have it")
    for path, shard in shards.items():
        if not shard.tensors.keys() <= weight_map.keys():
            extra = next(name for name in shard.tensors if name not in weight_map)
            raise FileFormatError.damaged(str(index), f"it does not list {extra}, which is in {path.name}")
    # Each name of the index is in a shard: where the shards have as many names, none of them is in two.
    if sum(len(shard.rows) + len(shard.extras) for shard in shards.values()) != len(weight_map):
        _refuse_duplicates(index, shards)
    text = metadata.get(records.SAFETENSORS_KEY)
    found = record_reading.record_in((text,), index)
    aliases = record_reading.aliases_in(metadata, tensors, found.record)
    tensors |= {name: tensors[first] for name, first in aliases.items()}
    tensors = record_reading.in_order_of(found.record, tensors)
    texts = [shard.texts for shard in shards.values()]
    formats = {shard.format for shard in shards.values()}
    contents = Contents(
        path=index.parent,
        format=formats.pop() if len(formats) == 1 else "mixed",
        tensors=tensors,
        # An index may leave out entries that are not tensors.
        extras={name: value for shard in shards.values() for name, value in shard.extras.items()},
        inner={name: entry for shard in shards.values() for name, entry in shard.inner.items()},
        record=found.record,
        texts=texts[0] if texts and all(other == texts[0] for other in texts) else {},
        foreign=_of_all(shards, lambda shard: shard.foreign),
        unseen=_of_all(shards, lambda shard: shard.unseen),
        hidden=_of_all(shards, lambda shard: shard.hidden),
        notes=(
            f"{counted(len(tensors), 'tensor')} in {counted(len(shards), 'shard')}, as {index.name} says",
            *found.notes,
        ),
    )
    return found.completed(contents)


def _shard(path: Path) -> Contents:
    shard = formats.read_file(Candidate(path))
    if shard.key is not None:
        raise FileFormatError(
            f"{path} is a training checkpoint, but a shard must be a plain state dict",
            "save only the state dict to each shard",
        )
    return shard


def _refuse_duplicates(index: Path, shards: Mapping[Path, Contents]) -> None:
    """Raise FileFormatError if two shards have an entry of the same name."""
    if len(set().union(*(shard.rows.keys() | shard.extras.keys() for shard in shards.values()))) == sum(
        len(shard.rows) + len(shard.extras) for shard in shards.values()
    ):
        return
    seen: dict[str, Path] = {}
    for path, shard in shards.items():
        for name in (*shard.rows, *shard.extras):
            if seen.setdefault(name, path) != path:
                raise FileFormatError(
                    f"{index}: two shards have {name}, {seen[name].name} and {path.name}", "remove it from one of them"
                )


def _of_all(shards: Mapping[Path, Contents], names: Callable[[Contents], Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for shard in shards.values() for name in names(shard)))


def index_of(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The file that an index names for each key, and its metadata. Raises FileFormatError where it is no index."""
    try:
        limits.INDEX_BYTES.check(path.stat().st_size, str(path))
        document = strict_json.loads(read_regular(path), str(path))
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is not a valid index of shards: {error}", "download it again, or name a file of weights"
        ) from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not {str} >= set(map(type, weight_map.values())):
        raise FileFormatError(
            f"{path} is not a valid index of shards: it has no weight_map from names to files",
            "download it again, or name a file of weights",
        )
    metadata = document.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def files_named(index: Path) -> set[str]:
    """Return the files that an index names, as it spells them. Raises FileFormatError if it is not an index."""
    return set(index_of(index)[0].values())
