"""Write `.pth` files: torch's zip format with uncompressed records on 64-byte boundaries and valid CRC-32s."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelcli.checkpoints import record as records
from modelcli.checkpoints.entries import CompositeEntry
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.layout import Bytes
from modelcli.checkpoints.plan import Plan, Source
from modelcli.checkpoints.torch_pickle import pickling, state_dicts
from modelcli.checkpoints.torch_pickle import zip_format as reader
from modelcli.checkpoints.torch_pickle.inert_values import OrderedDict
from modelcli.checkpoints.zip_archives.layout import ZipLayout, place
from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.model.dtypes import ITEM_BYTES

PREFIX = "archive"


def layout(plan: Plan) -> ZipLayout:
    """Return the layout of an archive. The same plan gives the same bytes, whatever the name of the file."""
    return archive(_tree(plan), [(records.ZIP_RECORD, Bytes(plan.record.encode()))])


def archive(value: Any, more: Sequence[tuple[str, Source]] = ()) -> ZipLayout:
    """Return the layout of an archive of a value, as `torch.save` writes it.

    Args:
        value: an inert value with the tensors to write.
        more: further records, by name.
    """
    storages: dict[tuple[Source, str | None], str] = {}

    def storage_key(source: Source, dtype: str | None) -> tuple[str, int]:
        # A storage has one dtype, so tensors that view the same bytes with other dtypes get a copy for each dtype.
        key = storages.setdefault((source, dtype), str(len(storages)))
        return key, source.nbytes // (ITEM_BYTES[dtype] if dtype else 1)

    data = pickling.dumps(value, storage_key)
    named: list[tuple[str, Source]] = [("data.pkl", Bytes(data)), ("byteorder", Bytes(b"little"))]
    named += [(f"data/{key}", source) for (source, _), key in storages.items()]
    named += [*more, ("version", Bytes(b"3\n"))]
    return ZipLayout(place([(f"{PREFIX}/{name}", source) for name, source in named]))


def _tree(plan: Plan) -> Any:
    """Return the state dict with its `_metadata`, inside the training checkpoint if there is one."""
    state_dict = OrderedDict(plan.entries)
    metadata = OrderedDict(plan.metadata)
    metadata[records.METADATA_KEY] = plan.record
    state_dict.state = {"_metadata": metadata}
    if plan.key is None:
        return state_dict
    return with_value_at(plan.tree, plan.key, state_dict)


def with_value_at(tree: Any, key: tuple[str | int, ...], value: Any) -> Any:
    """Return a tree with another value at the end of a path through its dicts and lists."""
    if not key:
        return value
    if isinstance(tree, list | tuple):
        return type(tree)(
            with_value_at(item, key[1:], value) if index == key[0] else item for index, item in enumerate(tree)
        )
    changed = type(tree)(tree)
    if isinstance(tree, OrderedDict):
        changed.state = tree.state
    changed[key[0]] = with_value_at(tree[key[0]], key[1:], value)
    return changed


def verify(plan: Plan, path: Path) -> None:
    """Read the written archive, and compare its contents with the plan."""
    try:
        contents = reader.read(Candidate(path), state_dicts.key_of(plan.key) if plan.key else None)
    except FileFormatError as error:
        raise SystemFailureError(f"what was read back is damaged; nothing was changed: {error.message}") from None
    found = {
        name: (e.shape, e.dtype, e.stored_bytes if isinstance(e, CompositeEntry) else e.storage.nbytes)
        for name, e in contents.tensors.items()
    }
    wanted = {name: (t.shape, t.dtype, t.source.nbytes) for name, t in plan.tensors.items()}
    wanted |= {name: (e.shape, e.dtype, e.stored_bytes) for name, e in plan.composites.items()}
    if found != wanted:
        raise SystemFailureError(f"what was read back from {path} is not what was written; nothing was changed")
