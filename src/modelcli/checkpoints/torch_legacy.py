"""The format of `torch.save` before 1.6: five pickles in a row, then the length and the bytes of each storage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from modelcli.blueprint import ITEM_BYTES
from modelcli.checkpoints import pickles, trees
from modelcli.checkpoints.contents import Contents, Span, identity_of
from modelcli.errors import FileFormatError, SystemFailureError

MAX_PICKLE_BYTES = 64 * 1024 * 1024
PROTOCOL = 1001
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def looks_like(head: bytes) -> bool:
    return head.startswith(b"\x80") and _MAGIC in head


def read(path: Path, key: str | None) -> Contents:
    """Read the pickles at the start, and find each storage behind them; no tensor's bytes are touched."""
    identity = identity_of(path)
    try:
        with path.open("rb") as file:
            stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
            pickles.read(stream, f"{path}: its start")
            protocol = pickles.read(stream, f"{path}: its protocol").value
            if protocol != PROTOCOL:
                raise FileFormatError(f"{path} is in no format that torch.save wrote: it has no protocol {PROTOCOL}")
            system = pickles.read(stream, f"{path}: its account of the system").value
            if isinstance(system, dict) and system.get("little_endian") is False:
                raise FileFormatError(f"{path} was written on a big-endian machine", "load and save it with torch")
            pickled = pickles.read(stream, f"{path}: its values")
            order = pickles.read(stream, f"{path}: its list of storages").value
            file.seek(stream.tell())
            spans = _spans(path, file, order, pickled.storages, identity)
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None

    def span_of(storage: str) -> Span:
        if storage not in spans:
            raise FileFormatError(f"{path} is damaged: storage {storage!r} is missing")
        return spans[storage]

    return trees.contents_of(path, pickled, span_of, key)


def _spans(
    path: Path,
    file: io.BufferedReader,
    order: Any,
    storages: dict[str, pickles.StorageRef],
    identity: tuple[int, int, int],
) -> dict[str, Span]:
    """Where each storage lies: a count of elements in eight bytes, then the elements."""
    if not isinstance(order, list) or not all(isinstance(key, str) and key in storages for key in order):
        raise FileFormatError(f"{path} is damaged: its list of storages does not fit its values")
    spans = {}
    for key in order:
        count = file.read(8)
        dtype = storages[key].dtype
        offset = file.tell()
        nbytes = int.from_bytes(count, "little") * (ITEM_BYTES[dtype] if dtype else 1)
        if len(count) < 8 or offset + nbytes > identity[0]:
            raise FileFormatError(f"{path} is cut off: storage {key!r} ends behind the end of the file")
        spans[key] = Span(path, offset, nbytes, identity)
        file.seek(nbytes, io.SEEK_CUR)
    return spans
