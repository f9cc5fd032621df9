"""The writer of folders: safetensors shards of a limited size, and the index that says which holds what."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from modelcli.checkpoints import formats, limits
from modelcli.checkpoints import record as records
from modelcli.checkpoints.format import RecordTooLargeError
from modelcli.checkpoints.layout import BytesLayout, CopyLayout, FolderLayout, Layout, notes_on_larger
from modelcli.checkpoints.plan import Plan, PlannedTensor
from modelcli.checkpoints.safetensors import SUFFIX
from modelcli.checkpoints.safetensors import writing as safetensors
from modelcli.checkpoints.sharded import reading as folders
from modelcli.checkpoints.sharded.names import INDEX_SUFFIX, WRITTEN_INDEX
from modelcli.errors import ModelcliError, SystemFailureError

#: The name of the only file of weights in the folder of a library's model.
WHOLE = f"model{SUFFIX}"
_SHARD = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?{re.escape(SUFFIX)}")


def layout(plan: Plan, max_bytes: int) -> FolderLayout:
    """Cut a plan into shards of at most `max_bytes` of tensors, in order; a larger tensor has one to itself.

    Raises RequestError for what safetensors has no name for; RecordTooLargeError where the index would be too large to
    be read with the record.
    """
    tensors = safetensors.unique(plan)
    groups = _cut(tensors, max_bytes)
    companions = {name: CopyLayout(source) for name, source in (plan.companions or {}).items()}
    if plan.whole_for and len(groups) > 1:
        notes: tuple[str, ...] = (_note_on_whole(plan.whole_for, tensors, max_bytes),)
        groups = [dict(tensors)]
    else:
        notes = notes_on_larger({name: tensor.source.nbytes for name, tensor in tensors.items()}, max_bytes)
    if plan.companions is not None and len(groups) == 1:
        whole = safetensors.layout_of(groups[0], safetensors.texts_of(plan))
        return FolderLayout({**companions, WHOLE: whole}, notes)
    files: dict[str, Layout] = {**companions}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}{SUFFIX}"
        files[name] = safetensors.layout_of(group, {"format": "pt", **plan.texts})
        weight_map |= dict.fromkeys(group, name)
    total = sum(tensor.source.nbytes for tensor in tensors.values())
    record = {records.SAFETENSORS_KEY: plan.record} if plan.record else {}
    metadata = {"total_size": total, **safetensors.aliases_of(plan), **record}
    document = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    index = json.dumps(document, indent=2).encode() + b"\n"
    if plan.record and len(index) > limits.INDEX_BYTES.value:
        raise RecordTooLargeError(
            f"the index would have {len(index):,} bytes with it, and modelcli reads {limits.INDEX_BYTES.value:,}"
        )
    files[WRITTEN_INDEX] = BytesLayout(index)
    return FolderLayout(files, notes)


def _note_on_whole(library: str, tensors: Mapping[str, PlannedTensor], max_bytes: int) -> str:
    """What to tell where a library needs one file that is larger than a shard may be."""
    nbytes = sum(tensor.source.nbytes for tensor in tensors.values())
    return (
        f"{library} reads the weights of a folder from one file: {WHOLE} has all {nbytes:,} bytes of them, "
        f"more than the {max_bytes:,} of a shard"
    )


def superseded(path: Path) -> set[str]:
    """The names of the files in a folder that the checkpoint in it is made of: they go when another takes its place.

    A folder may hold several checkpoints. Where one of them is of this writer's own format, that one alone is replaced:
    its index and what that names, or the files that are called as this writer calls them where there is no index.
    Where there is none, the new checkpoint replaces what the folder is read by, in whatever format that is.
    """
    names = {entry.name for entry in path.iterdir()}
    if WRITTEN_INDEX in names:
        return {WRITTEN_INDEX, *(names & _named_by(path / WRITTEN_INDEX))}
    if own := {name for name in names if _SHARD.fullmatch(name)}:
        return own
    return formats.checkpoint_files(path, names)


def files_in(folder: Path, names: set[str]) -> set[str]:
    """The indexes in a folder, and the shards that they name."""
    indexes = {name for name in names if name.endswith(INDEX_SUFFIX)}
    return indexes.union(*(names & _named_by(folder / index) for index in indexes))


def _named_by(index: Path) -> set[str]:
    """The files that an index names; none of one that nobody can read."""
    with contextlib.suppress(ModelcliError):
        return folders.files_named(index)
    return set()


def _cut(tensors: Mapping[str, PlannedTensor], max_bytes: int) -> list[dict[str, PlannedTensor]]:
    groups: list[dict[str, PlannedTensor]] = [{}]
    size = header = 0
    for name, tensor in tensors.items():
        added = safetensors.most_header_bytes(name, tensor)
        is_full = size + tensor.source.nbytes > max_bytes or header + added > safetensors.MAX_HEADER_BYTES
        if groups[-1] and is_full:
            groups.append({})
            size = header = 0
        groups[-1][name] = tensor
        size += tensor.source.nbytes
        header += added
    return groups


def verify(plan: Plan, layout: FolderLayout, path: Path) -> None:
    """Read the index back, and let safetensors' own reader find in every shard what the index says of it."""
    if WRITTEN_INDEX not in layout.files:
        safetensors.verify(plan, path / WHOLE)
        return
    index = (path / WRITTEN_INDEX).read_bytes()
    if [index] != [bytes(chunk) for _, source in layout.files[WRITTEN_INDEX].parts() for chunk in source.chunks()]:
        raise SystemFailureError(
            f"what was read back from {WRITTEN_INDEX} is not what was written; nothing was changed"
        )
    weight_map = json.loads(index)["weight_map"]
    if weight_map.keys() != safetensors.unique(plan).keys():
        raise SystemFailureError(f"{WRITTEN_INDEX} does not name the tensors that were written; nothing was changed")
    for file in layout.files.keys() - {WRITTEN_INDEX, *(plan.companions or ())}:
        if safetensors.read_back(path / file) != {name for name, held_in in weight_map.items() if held_in == file}:
            raise SystemFailureError(f"what was read back from {file} is not what was written; nothing was changed")
