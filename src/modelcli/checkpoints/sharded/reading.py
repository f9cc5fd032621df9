"""Folders of shards: an index, `*.index.json`, that says which file holds which tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from modelcli.checkpoints import limits, record_reading, strict_json
from modelcli.checkpoints import record as records
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.errors import FileFormatError, RequestError, SystemFailureError
from modelcli.files.open_folder import read_regular
from modelcli.wording import counted, listed

INDEX_SUFFIX = ".index.json"
#: The account of a folder that torch.distributed.checkpoint wrote, and how the files end that each rank writes.
METADATA, RANK_SUFFIX = ".metadata", ".distcp"

#: The names under which Hugging Face's programs keep all weights of a model, or of an adapter, in one file.
WHOLE_FILES = frozenset(
    f"{stem}{suffix}"
    for stem, suffixes in {
        "model": (".safetensors",),
        "pytorch_model": (".bin",),
        "adapter_model": (".safetensors", ".bin"),
        "diffusion_pytorch_model": (".safetensors", ".bin"),
        "open_clip_model": (".safetensors",),
        "open_clip_pytorch_model": (".bin",),
    }.items()
    for suffix in suffixes
)

#: What each process writes where torch.distributed.checkpoint writes safetensors: a part of each tensor.
_PART = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")

Reader = Callable[[Path], Contents]


def metadata_in(folder: Path) -> Path | None:
    """The `.metadata` of a folder; None where it has none, or an index of shards that goes first."""
    path = folder / METADATA
    if not path.is_file() or any(folder.glob(f"*{INDEX_SUFFIX}")):
        return None
    return path


def index_in(folder: Path) -> Path:
    """The index of a folder, or of one without an index its only file of weights under a name that all programs use.

    Raises RequestError where there is none, or where several things may be meant, with what lies there.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise SystemFailureError(f"cannot read {folder}: {error.strerror or error}") from None
    found = [name for name in names if name.endswith(INDEX_SUFFIX)]
    whole = [name for name in names if name in WHOLE_FILES]
    if found and whole:  # programs differ in which they take
        told = listed([str(folder / name) for name in (*found, *whole)], 6)
        raise RequestError(f"{folder} holds an index and {whole[0]}, each with the weights", f"name one of {told}")
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise RequestError(f"{folder} holds {len(found)} indexes", f"name one of {listed(found, 6)}")
    if len(whole) == 1:
        return folder / whole[0]
    if whole:
        told = listed([str(folder / name) for name in whole], 6)
        raise RequestError(f"{folder} holds {len(whole)} files of weights and no index", f"name one of {told}")
    from modelcli.checkpoints.torch_pickle import deepspeed

    deepspeed.require_no_checkpoint(folder, names)
    if parts := [name for name in names if _PART.fullmatch(name)]:
        raise RequestError(
            f"{folder} holds {len(parts)} files of torch.distributed.checkpoint's HuggingFaceStorageWriter, each with "
            "what one process wrote",
            "torch.distributed.checkpoint._consolidate_hf_safetensors.consolidate_safetensors_files(folder, other, "
            "num_threads=1, fqn_to_index_mapping={name: 1 for each tensor}) puts them together, and so does the writer "
            "with enable_consolidation=True",
        )
    files = [name for name in names if name.lower().endswith((".pth", ".pt", ".safetensors", ".bin", ".ckpt"))]
    hint = f"name a file in it: {listed(files, 6)}" if files else None
    raise RequestError(f"{folder} is a folder without an index (*{INDEX_SUFFIX})", hint)


def read(index: Path, read_file: Reader) -> Contents:
    """Read an index and the headers of the shards it names. Raises FileFormatError where they do not fit together."""
    weight_map, metadata = _index(index)
    paths: dict[str, Path] = {}
    shards: dict[Path, Contents] = {}
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    for name, file in weight_map.items():
        if file not in paths:
            paths[file] = inside(index, file)
            # One file may be spelt in several ways, and is read once.
            if paths[file].resolve() not in shards:
                shards[paths[file].resolve()] = _shard(paths[file], read_file)
        shard = shards[paths[file].resolve()]
        if (entry := shard.tensors.get(name)) is not None:
            tensors[name] = entry
        elif name not in shard.extras:
            raise FileFormatError(f"{index} says that {name} is in {file}, and it is not")
    for path, shard in shards.items():
        if extra := next((name for name in shard.tensors if name not in weight_map), None):
            raise FileFormatError(f"{path.name} holds {extra}, which {index} does not name")
    _refuse_twins(index, shards)
    text = metadata.get(records.SAFETENSORS_KEY)
    record, wrong = record_reading.record_in((text,), index)
    tensors |= {name: tensors[first] for name, first in record_reading.aliases_in(metadata, tensors, record).items()}
    tensors = record_reading.in_order_of(record, tensors)
    texts = [shard.texts for shard in shards.values()]
    formats = {shard.format for shard in shards.values()}
    return Contents(
        path=index.parent,
        format=formats.pop() if len(formats) == 1 else "mixed",
        tensors=tensors,
        # An index may leave out what is no tensor.
        extras={name: value for shard in shards.values() for name, value in shard.extras.items()},
        inner={name: entry for shard in shards.values() for name, entry in shard.inner.items()},
        record=record,
        texts=texts[0] if texts and all(other == texts[0] for other in texts) else {},
        foreign=_of_all(shards, lambda shard: shard.foreign),
        unseen=_of_all(shards, lambda shard: shard.unseen),
        hidden=_of_all(shards, lambda shard: shard.hidden),
        notes=(f"{counted(len(tensors), 'tensor')} in {counted(len(shards), 'shard')}, as {index.name} says", *wrong),
    )


def _shard(path: Path, read_file: Reader) -> Contents:
    shard = read_file(path)
    if shard.key is not None:
        raise FileFormatError(f"{path} is a training checkpoint, and a shard is nothing but tensors by name")
    return shard


def _refuse_twins(index: Path, shards: Mapping[Path, Contents]) -> None:
    """Raise FileFormatError for a name that two shards give to what is no tensor, or to a tensor in it."""
    seen: dict[str, Path] = {}
    for path, shard in shards.items():
        for name in (*shard.rows, *shard.extras):
            if seen.setdefault(name, path) != path:
                raise FileFormatError(f"{index}: {seen[name].name} and {path.name} both hold {name}")


def _of_all(shards: Mapping[Path, Contents], names: Callable[[Contents], Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for shard in shards.values() for name in names(shard)))


def _index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        limits.INDEX_BYTES.check(path.stat().st_size, str(path))
        document = strict_json.loads(read_regular(path), str(path))
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is no index of shards: {error}") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FileFormatError(f"{path} is no index of shards: it has no weight_map of names to files")
    metadata = document.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def files_named(index: Path) -> set[str]:
    """The files that an index names, as it spells them. Raises FileFormatError where it is none."""
    return set(_index(index)[0].values())


def inside(index: Path, file: str) -> Path:
    """The path of a shard, which has to stay inside the folder of its index, links followed."""
    parts = (*PurePosixPath(file).parts, *PureWindowsPath(file).parts)
    absolute = PurePosixPath(file).is_absolute() or PureWindowsPath(file).drive or PureWindowsPath(file).root
    if not file or "\0" in file or absolute or ".." in parts:
        raise FileFormatError(f"{index} names {file!r}, which is outside its folder")
    path = index.parent / file
    # A cache of downloads keeps the index and its shards side by side in one folder, and links to both from another.
    homes = {index.parent.resolve(), index.resolve().parent}
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise FileFormatError(f"{index} names {file!r}, a link to outside its folder")
    if not path.is_file():
        raise FileFormatError(f"{index} names {file!r}, which is not there", "a shard may not be downloaded yet")
    return path
