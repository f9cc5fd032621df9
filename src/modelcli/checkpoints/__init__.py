"""Reading checkpoints without torch: names, shapes, dtypes, and where each tensor's bytes lie. Nothing is executed."""

from __future__ import annotations

from pathlib import Path

from modelcli.checkpoints import distributed, folders, kinds, safetensors, torch_legacy, torch_zip
from modelcli.checkpoints.contents import CompositeEntry, Contents, Span, Storage, TensorEntry
from modelcli.errors import FileFormatError, RequestError, SystemFailureError

__all__ = ["CompositeEntry", "Contents", "Span", "Storage", "TensorEntry", "read"]


def read(path: Path, *, key: str | None = None) -> Contents:
    """Read what a checkpoint holds, by its content and never by its suffix.

    A folder is read by the index of shards in it, or by the `.metadata` of `torch.distributed.checkpoint`. `key` names
    the state dict inside a training checkpoint (`a.b` for one inside another). Raises FileFormatError for a file that
    is corrupt or no checkpoint.
    """
    try:
        if path.is_dir():
            path = distributed.metadata_in(path) or folders.index_in(path)
        if not path.exists():
            raise RequestError(f"no such file: {path}")
        if not path.is_file():
            raise RequestError(f"{path} is a device or a pipe, and a checkpoint is a file", "save it to a file first")
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    if path.name.endswith(folders.INDEX_SUFFIX):
        _refuse_key(key, path, "an index of shards")
        return folders.read(path, _read_file)
    if path.name == distributed.METADATA:
        return distributed.read(path, key)
    return _read_file(path, key)


def _read_file(path: Path, key: str | None = None) -> Contents:
    """Read one file that holds tensors itself."""
    try:
        return _read_by_content(path, key)
    except FileFormatError as error:
        if path.suffix == distributed.SUFFIX and (path.parent / distributed.METADATA).exists():
            what = f"{path} is what one rank wrote of a torch.distributed.checkpoint"
            raise FileFormatError(what, f"name its folder: {path.parent}/") from None
        raise error


def _read_by_content(path: Path, key: str | None) -> Contents:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(kinds.HEAD_BYTES)
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    if not size:
        raise FileFormatError(f"{path} is empty", "the program that wrote it may have been interrupted")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return torch_zip.read(path, key)
    if safetensors.looks_like(head, size):
        _refuse_key(key, path, "a safetensors file")
        return safetensors.read(path)
    if torch_legacy.looks_like(head):
        return torch_legacy.read(path, key)
    if kind := kinds.name(head):
        raise FileFormatError(f"{path} is {kind.name}", kind.hint)
    what, hint = kinds.unknown(head)
    raise FileFormatError(f"{path} {what}", hint)


def _refuse_key(key: str | None, path: Path, what: str) -> None:
    if key is not None:
        raise RequestError(f"--key {key} is for training checkpoints, and {path} is {what}")
