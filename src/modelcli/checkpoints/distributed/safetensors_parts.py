"""Read folders in which each process of `torch.distributed.checkpoint` wrote a safetensors file with its parts.

`HuggingFaceStorageWriter(save_distributed=True)` writes them. Each file states the offsets of its parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from modelcli.checkpoints import limits, shapes, strict_json
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.distributed import blocks
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.safetensors import SUFFIX
from modelcli.checkpoints.safetensors import reading as safetensors
from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.wording import counted

_PART = re.compile(r"shard-(?P<rank>\d{1,9})-model-\d+-of-\d+" + re.escape(SUFFIX))
#: The key of `__metadata__` under which the offsets are, and that of the offsets of a tensor.
_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


def files_in(names: Sequence[str]) -> list[str]:
    """Return those of the names that are such files."""
    return sorted(name for name in names if _PART.fullmatch(name))


def read(path: Path) -> Contents:
    """Read the headers of all such files in the folder of one of them, and put the tensors together.

    The files do not state the shape of a whole tensor: it ends where its last part ends, as for torch's own reader.
    Raises FileFormatError if the parts of a tensor do not cover it exactly once.
    """
    folder = path.parent
    try:
        names = files_in([entry.name for entry in folder.iterdir()])
    except OSError as error:
        raise SystemFailureError(f"cannot read {folder}: {error.strerror or error}") from None
    _require_all_ranks(folder, names)
    found: dict[str, list[blocks.Block]] = {}
    dtypes: dict[str, str] = {}
    size = 0
    for name in names:
        contents = safetensors.read(folder / name)
        offsets = _offsets_in(folder / name, contents.texts.get(_SHARDING))
        size += limits.size_of_names([*contents.tensors])
        for key, entry in contents.tensors.items():
            where = f"{folder / name}: {key}"
            if not isinstance(entry, TensorEntry):
                raise FileFormatError(f"{where} is not a dense tensor of torch, of which modelcli joins no parts")
            if dtypes.setdefault(key, entry.dtype) != entry.dtype:
                raise FileFormatError.damaged(where, f"it is {entry.dtype}, but another part is {dtypes[key]}")
            stated = offsets.get(key, {}) if offsets is not None else {_OFFSETS: [0] * len(entry.shape)}
            found.setdefault(key, []).append(_block(where, entry, stated))
    budget = limits.Budget(f"{folder}: the parts of its tensors", size)
    tensors = {key: _joined(folder, key, dtypes[key], parts, budget) for key, parts in found.items()}
    notes = (
        f"{counted(len(tensors), 'tensor')} in {counted(len(names), 'file')} of torch.distributed.checkpoint",
        "the files do not state how many processes wrote them: make sure that none is missing at the end",
    )
    return Contents(folder, "dcp_safetensors", tensors, notes=notes)


def _require_all_ranks(folder: Path, names: Sequence[str]) -> None:
    """Raise FileFormatError if a number is left out: processes count from 1."""
    ranks = {int(match["rank"]) for name in names if (match := _PART.fullmatch(name))}
    if (last := max(ranks)) > len(ranks):
        missing = next(rank for rank in range(1, last) if rank not in ranks)
        raise FileFormatError(
            f"{folder} has files of {counted(len(ranks), 'process', 'processes')} up to number {last}, but none of "
            f"number {missing}",
            "copy the files of all processes into it",
        )


def _offsets_in(path: Path, text: str | None) -> dict[str, Any] | None:
    """Return what a file states of its parts by the names of tensors; None if it states nothing: they are whole."""
    if text is None:
        return None
    try:
        found = strict_json.loads(text.encode(), f"{path}: {_SHARDING}")
    except (ValueError, RecursionError) as error:
        raise FileFormatError.damaged(str(path), f"its {_SHARDING} is not valid: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise FileFormatError.damaged(str(path), f"its {_SHARDING} does not consist of objects by name")
    return found


def _block(where: str, entry: TensorEntry, stated: dict[str, Any]) -> blocks.Block:
    try:
        offsets = shapes.sizes(stated.get(_OFFSETS), where)
        if len(offsets) != len(entry.shape):
            raise ValueError(f"it has {len(offsets)} offsets, but {len(entry.shape)} dimensions")
    except ValueError as error:
        raise FileFormatError.damaged(where, f"its {_OFFSETS} are wrong: {error}") from None
    return blocks.Block(offsets, entry.shape, entry.storage)


def _joined(folder: Path, key: str, dtype: str, parts: Sequence[blocks.Block], budget: limits.Budget) -> TensorEntry:
    ends = [tuple(map(int.__add__, part.offsets, part.sizes)) for part in parts]
    if len({len(end) for end in ends}) > 1:
        raise FileFormatError.damaged(str(folder), f"the parts of {key} have different numbers of dimensions")
    try:
        shape = shapes.shape(tuple(max(along) for along in zip(*ends, strict=True)), f"{folder}: {key}")
    except ValueError as error:
        raise FileFormatError.damaged(str(folder), f"the shape of {key} is wrong: {error}") from None
    filled = [part for part in parts if 0 not in part.sizes] or [*parts[:1]]
    if prod(shape) and not blocks.cover_once(shape, filled, budget):
        raise FileFormatError.damaged(
            str(folder), f"the parts of {key} do not cover its shape {list(shape)} exactly once"
        )
    storage = blocks.joined(shape, ITEM_BYTES[dtype], filled)
    return TensorEntry(shape, dtype, shapes.row_major(shape), 0, storage)
