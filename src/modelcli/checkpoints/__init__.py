"""Reading checkpoints without torch: names, shapes, dtypes, and where each tensor's bytes lie. Nothing is executed."""

from __future__ import annotations

from pathlib import Path

from modelcli.checkpoints import distributed, folders, safetensors, torch_legacy, torch_zip
from modelcli.checkpoints.contents import Contents, Span, Storage, TensorEntry
from modelcli.errors import FileFormatError, RequestError, SystemFailureError

__all__ = ["Contents", "Span", "Storage", "TensorEntry", "read"]

_NAMES = (
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file it points to: run git lfs pull"),
    (b"<!doctype", "an HTML page: the download went wrong"),
    (b"<html", "an HTML page: the download went wrong"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it"),
    (b"\x93NUMPY", "a NumPy array"),
)


def read(path: Path, *, key: str | None = None) -> Contents:
    """Read what a checkpoint holds, by its content and never by its suffix.

    A folder is read by the index of shards in it, or by the `.metadata` of `torch.distributed.checkpoint`. `key` names
    the state dict inside a training checkpoint (`a.b` for one inside another). Raises FileFormatError for a file that
    is corrupt or no checkpoint.
    """
    try:
        if path.is_dir():
            path = distributed.metadata_in(path) or folders.index_in(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise RequestError(f"no such file: {path}") from None
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    if not size:
        raise FileFormatError(f"{path} is empty", "the program that wrote it may have been interrupted")
    if path.name.endswith(folders.INDEX_SUFFIX):
        if key is not None:
            raise RequestError(f"--key {key} is for training checkpoints, and {path} is an index of shards")
        return folders.read(path, lambda shard: read(shard))
    if path.name == distributed.METADATA:
        return distributed.read(path, key)
    if head.startswith(b"PK"):
        return torch_zip.read(path, key)
    if safetensors.looks_like(head, size):
        if key is not None:
            raise RequestError(f"--key {key} is for training checkpoints, and {path} is a safetensors file")
        return safetensors.read(path)
    if torch_legacy.looks_like(head):
        return torch_legacy.read(path, key)
    name = next(
        (name for magic, name in _NAMES if head.startswith(magic) or head.strip().lower().startswith(magic)), None
    )
    raise FileFormatError(
        f"{path} is {name}" if name else f"{path} is not a checkpoint: it starts with {head[:8]!r}",
        "a checkpoint is a .pth that torch.save wrote, or a .safetensors file",
    )
