"""Read the format of `torch.save` before 1.6: five pickles, then the length and the bytes of each storage."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelcli.checkpoints import limits
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.storage import Span, Storage, identity_of
from modelcli.checkpoints.torch_pickle import pickles, trees
from modelcli.checkpoints.torch_pickle.inert_values import StorageRef
from modelcli.checkpoints.torch_pickle.recognition import is_legacy
from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.model.dtypes import ITEM_BYTES

PROTOCOL = 1001
_SAVE_WITH_TORCH = "load it with torch on that kind of machine, and save it again with torch.save on this one"


def read(path: Path, key: str | None) -> Contents:
    """Read the pickles at the start, and find where each storage is after them. The bytes of tensors are not read."""
    return trees.contents_of(path, pickle_of(path), key)


def pickle_of(path: Path) -> pickles.Pickle:
    """Return the pickle of values, with the foreign names of all pickles in the file. No bytes of tensors are read."""
    try:
        identity = identity_of(path)
        with path.open("rb") as file:
            stream = io.BytesIO(file.read(limits.PICKLE_BYTES.value))
            cut = len(stream.getbuffer()) < identity[0]
            beside = [pickles.read(stream, f"{path}: the magic number")]
            beside.append(pickles.read(stream, f"{path}: the protocol version"))
            if beside[-1].value != PROTOCOL:
                raise FileFormatError(
                    f"{path} starts like a torch.save file, but its protocol version is not {PROTOCOL}",
                    "convert it with the program that wrote it",
                )
            beside.append(pickles.read(stream, f"{path}: the description of the system"))
            system = beside[-1].value
            if isinstance(system, dict) and system.get("little_endian") is False:
                raise FileFormatError(
                    f"{path} has big-endian values, but modelcli reads little-endian ones", _SAVE_WITH_TORCH
                )
            # The position of a storage depends on its dtype, which only the values name: they are read twice.
            start, dtypes = stream.tell(), _Dtypes(path, identity)
            pickles.read(stream, f"{path}: the pickle of values", dtypes.span_of)
            beside.append(pickles.read(stream, f"{path}: the list of storages"))
            file.seek(stream.tell())
            spans = _spans(path, file, beside[-1].value, dtypes.found, identity)
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    except FileFormatError:
        if cut and stream.tell() >= len(stream.getbuffer()):
            raise limits.PICKLE_BYTES.exceeded(f"{path}: the pickle of values", "more than that") from None
        raise

    def span_of(storage: str, _dtype: str | None) -> Span:
        if storage not in spans:
            raise FileFormatError.damaged(str(path), f"the storage {storage!r} is missing")
        return spans[storage]

    stream.seek(start)
    pickled = pickles.read(stream, f"{path}: the pickle of values", span_of, exact=True)
    # Loading the file runs all of its pickles, so the names in each of them count.
    names = (name for part in (*beside, pickled) for name in part.foreign)
    return replace(pickled, foreign=tuple(dict.fromkeys(names)))


def storage_in(data: bytes, where: str, held: Callable[[memoryview], Storage]) -> StorageRef | None:
    """Return the storage in bytes that `torch.save` wrote for a single storage, as pickling a storage does.

    Args:
        data: the bytes.
        where: their name in error messages.
        held: makes a storage of a part of the bytes.

    Returns:
        None if the bytes are anything else.
    """
    if not is_legacy(data[:32]):
        return None
    stream = io.BytesIO(data)
    start = [pickles.read(stream, where) for _ in range(3)]
    if start[1].value != PROTOCOL:
        return None
    if isinstance(start[2].value, dict) and start[2].value.get("little_endian") is False:
        raise FileFormatError(f"{where} has big-endian values, but modelcli reads little-endian ones", _SAVE_WITH_TORCH)
    dtypes = _Dtypes(Path(where), (0, 0, 0))
    value = pickles.read(stream, where, dtypes.span_of)
    order = pickles.read(stream, where).value
    if not isinstance(value.value, StorageRef) or order != list(dtypes.found) or len(order) != 1:
        return None
    if any(part.foreign for part in (*start, value)) or value.value.offset:
        return None
    count = int.from_bytes(data[stream.tell() : stream.tell() + 8], "little")
    rest = memoryview(data)[stream.tell() + 8 :]
    if len(rest) != count * value.value.item or count != value.value.count:
        raise FileFormatError.damaged(where, f"it states {count:,} elements, but {len(rest):,} bytes follow")
    return replace(value.value, span=held(rest))


class _Dtypes:
    """Collects the dtype of each storage by its key. `anywhere` stands in for the bytes, which are not known yet."""

    def __init__(self, path: Path, identity: tuple[int, int, int]) -> None:
        self.anywhere = Span(path, 0, 2**63, identity)
        self.found: dict[str, str | None] = {}

    def span_of(self, key: str, dtype: str | None) -> Span:
        self.found[key] = dtype
        return self.anywhere


def _spans(
    path: Path,
    file: io.BufferedReader,
    order: Any,
    dtypes: Mapping[str, str | None],
    identity: tuple[int, int, int],
) -> dict[str, Span]:
    """Return the bytes of each storage. In the file each is a count of elements in eight bytes, then the elements."""
    if not isinstance(order, list) or not all(isinstance(key, str) and key in dtypes for key in order):
        raise FileFormatError.damaged(str(path), "its list of storages names storages that its values do not use")
    if len(set(order)) < len(order):
        raise FileFormatError.damaged(str(path), "its list of storages names one of them twice")
    spans = {}
    for key in order:
        count = file.read(8)
        dtype = dtypes[key]
        offset = file.tell()
        nbytes = int.from_bytes(count, "little") * (ITEM_BYTES[dtype] if dtype else 1)
        if len(count) < 8:
            raise FileFormatError.damaged(str(path), f"it ends before storage {key!r}")
        if offset + nbytes > identity[0]:
            raise FileFormatError.damaged(
                str(path),
                f"storage {key!r} would end at byte {offset + nbytes:,}, but the file has {identity[0]:,} bytes",
            )
        spans[key] = Span(path, offset, nbytes, identity)
        file.seek(nbytes, io.SEEK_CUR)
    return spans
