"""The writer of `.pth`: torch's zip format, stored records on 64-byte boundaries, valid CRC-32s."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from modelcli import record as records
from modelcli.blueprints import ITEM_BYTES
from modelcli.checkpoints import CompositeEntry
from modelcli.checkpoints import torch_zip as reader
from modelcli.checkpoints.pickles import OrderedDict
from modelcli.errors import SystemFailureError
from modelcli.writing import pickling
from modelcli.writing.plan import Plan, Source

PREFIX = "archive"
ALIGNMENT = 64


def write(plan: Plan, file: BinaryIO) -> None:
    """Write the archive. The same plan gives the same bytes, whatever the file is called."""
    storages: dict[tuple[Source, str | None], str] = {}

    def storage_key(source: Source, dtype: str | None) -> tuple[str, int]:
        # A record has one class: of tensors that read the same bytes as other dtypes, each class gets its own copy.
        key = storages.setdefault((source, dtype), str(len(storages)))
        return key, source.nbytes // (ITEM_BYTES[dtype] if dtype else 1)

    data = pickling.dumps(_tree(plan), storage_key)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, file, "data.pkl", [data], len(data))
        _add(archive, file, "byteorder", [b"little"], 6)
        for (source, _), key in storages.items():
            _add(archive, file, f"data/{key}", source.chunks(), source.nbytes)
        record = plan.record.encode()
        _add(archive, file, records.ZIP_RECORD, [record], len(record))
        _add(archive, file, "version", [b"3\n"], 2)


def _tree(plan: Plan) -> Any:
    """The state dict with its `_metadata`, in its place inside the training checkpoint where there is one."""
    state_dict = OrderedDict(plan.tensors)
    state_dict.update(plan.extras)
    metadata = OrderedDict(plan.metadata)
    metadata[records.METADATA_KEY] = plan.record
    state_dict.state = {"_metadata": metadata}
    if plan.key is None:
        return state_dict
    return _with(plan.tree, plan.key, state_dict)


def _with(tree: Any, key: tuple[str, ...], value: Any) -> Any:
    if not key:
        return value
    changed = type(tree)(tree)
    if isinstance(tree, OrderedDict):
        changed.state = tree.state
    changed[key[0]] = _with(tree[key[0]], key[1:], value)
    return changed


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
    """Add one stored record whose bytes start on a boundary: the header's extra field is padded up to it."""
    info = zipfile.ZipInfo(f"{PREFIX}/{name}", (1980, 1, 1, 0, 0, 0))
    info.create_system = 0
    info.external_attr = 0
    info.file_size = size
    zip64 = size * 1.05 > zipfile.ZIP64_LIMIT
    start = file.tell() + 30 + len(info.filename.encode()) + (20 if zip64 else 0) + 4
    padding = -start % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=zip64) as record:
        for chunk in chunks:
            record.write(chunk)


def verify(plan: Plan, path: Path) -> None:
    """Read the archive's own account of itself back, and compare it with the plan."""
    contents = reader.read(path, ".".join(plan.key) if plan.key else None)
    found = {
        name: (e.shape, e.dtype, e.stored_bytes if isinstance(e, CompositeEntry) else e.storage.nbytes)
        for name, e in contents.tensors.items()
    }
    wanted = {name: (t.shape, t.dtype, t.source.nbytes) for name, t in plan.tensors.items()}
    wanted |= {name: (e.shape, e.dtype, e.stored_bytes) for name, e in plan.composites.items()}
    if found != wanted:
        raise SystemFailureError(f"what was read back from {path.parent} is not what was written; nothing was changed")
