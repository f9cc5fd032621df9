"""The writer of folders: safetensors shards of a limited size, and the index that says which holds what."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modelcli.checkpoints import record as records
from modelcli.checkpoints.plan import Plan, PlannedTensor
from modelcli.checkpoints.safetensors import writing as safetensors
from modelcli.checkpoints.sharded import reading as folders
from modelcli.errors import ModelcliError, SystemFailureError

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
#: As large as Hugging Face's programs make them.
DEFAULT_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Folder:
    """A folder as it will be: the layout of each shard by its name, and the text of the index."""

    shards: Mapping[str, safetensors.Layout]
    names: Mapping[str, frozenset[str]]
    index: bytes

    @property
    def nbytes(self) -> int:
        return len(self.index) + sum(layout.nbytes for layout in self.shards.values())


def layout(plan: Plan, max_bytes: int) -> Folder:
    """Cut a plan into shards of at most `max_bytes` of tensors, in order; a larger tensor has one to itself."""
    groups = _cut(safetensors.unique(plan), max_bytes)
    shards: dict[str, safetensors.Layout] = {}
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        shards[name] = safetensors.layout_of(tensors, {"format": "pt", **plan.texts})
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(tensor.source.nbytes for tensors in groups for tensor in tensors.values())
    metadata = {"total_size": total, **safetensors.aliases_of(plan), records.SAFETENSORS_KEY: plan.record}
    document = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    index = json.dumps(document, indent=2).encode() + b"\n"
    held = {name: frozenset(key for key, file in weight_map.items() if file == name) for name in shards}
    return Folder(shards, held, index)


def superseded(path: Path) -> set[str]:
    """The names of the files in a folder that the checkpoint in it is made of: they go when another takes its place.

    A folder may hold several checkpoints. Where one of them is of this writer's own format, that one alone is replaced:
    its index and what that names, or the files that are called as this writer calls them where there is no index.
    Where there is none, the new checkpoint replaces what the folder is read by: another index and its shards, or what
    torch.distributed.checkpoint wrote.
    """
    names = {entry.name for entry in path.iterdir()}
    if INDEX in names:
        return {INDEX, *(names & _named_by(path / INDEX))}
    if own := {name for name in names if _SHARD.fullmatch(name)}:
        return own
    found = {name for name in names if name.endswith(folders.INDEX_SUFFIX)}
    for index in found.copy():
        found |= names & _named_by(path / index)
    if folders.METADATA in names:
        found |= {name for name in names if name == folders.METADATA or name.endswith(".distcp")}
    return found


def _named_by(index: Path) -> set[str]:
    """The files that an index names; none of one that nobody can read."""
    with contextlib.suppress(ModelcliError):
        return folders.files_named(index)
    return set()


def other_indexes(path: Path) -> list[str]:
    """The indexes of other checkpoints in a folder that this writer has written to."""
    return sorted(entry.name for entry in path.iterdir() if _is_other_index(entry.name))


def _is_other_index(name: str) -> bool:
    return name == folders.METADATA or (name.endswith(folders.INDEX_SUFFIX) and name != INDEX)


def _cut(tensors: Mapping[str, PlannedTensor], max_bytes: int) -> list[dict[str, PlannedTensor]]:
    groups: list[dict[str, PlannedTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.source.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.source.nbytes
    return groups


def verify_headers(folder: Folder, path: Path) -> None:
    """Let safetensors' own reader check every shard, and read the index back."""
    if (path / INDEX).read_bytes() != folder.index:
        raise SystemFailureError(f"what was read back from {INDEX} is not what was written; nothing was changed")
    for name, held in folder.names.items():
        if safetensors.read_back(path / name) != held:
            raise SystemFailureError(f"what was read back from {name} is not what was written; nothing was changed")
