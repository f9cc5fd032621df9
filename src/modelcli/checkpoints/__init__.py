"""Reading checkpoints without torch: names, shapes, dtypes, and where each tensor's bytes lie. Nothing is executed."""

from __future__ import annotations

import stat
from pathlib import Path

from modelcli.checkpoints import unknown_files
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.sharded import reading as folders
from modelcli.checkpoints.storage import Span, Storage
from modelcli.errors import FileFormatError, RequestError, SystemFailureError

__all__ = ["CompositeEntry", "Contents", "Span", "Storage", "TensorEntry", "accounts_beside", "read"]

#: How many bytes the end of a zip archive takes that has no comment.
_ZIP_END = 22


def read(path: Path, *, key: str | None = None) -> Contents:
    """Read what a checkpoint holds, by its content and never by its suffix.

    A folder is read by the index of shards in it, or by the `.metadata` of `torch.distributed.checkpoint`. `key` names
    the state dict inside a training checkpoint (`a.b` for one inside another). Raises FileFormatError for a file that
    is corrupt or no checkpoint.
    """
    try:
        if path.is_dir():
            path = folders.metadata_in(path) or folders.index_in(path)
        if not path.exists():
            raise RequestError(f"no such file: {path}")
        if not path.is_file():
            raise RequestError(f"{path} is a device or a pipe, and a checkpoint is a file", "save it to a file first")
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    if path.name.endswith(folders.INDEX_SUFFIX):
        _refuse_key(key, path, "an index of shards")
        return folders.read(path, _read_file)
    if path.name == folders.METADATA:
        from modelcli.checkpoints.distributed import reading as distributed

        return distributed.read(path, key)
    return _read_file(path, key)


def accounts_beside(path: Path) -> list[Path]:
    """What lies beside an index of shards or a `.metadata` that `path` names, from which others may load the folder.

    That is another of these, or a file with all weights under a name that programs look for.
    """
    if path.is_dir():
        path = folders.metadata_in(path) or folders.index_in(path)
    if not path.name.endswith(folders.INDEX_SUFFIX) and path.name != folders.METADATA:
        return []
    found = [*path.parent.glob(f"*{folders.INDEX_SUFFIX}"), path.parent / folders.METADATA]
    found += [path.parent / name for name in folders.WHOLE_FILES]
    return sorted(other for other in found if other != path and other.is_file())


def _read_file(path: Path, key: str | None = None) -> Contents:
    """Read one file that holds tensors itself."""
    try:
        return _read_by_content(path, key)
    except FileFormatError as error:
        if path.suffix == folders.RANK_SUFFIX and (path.parent / folders.METADATA).exists():
            what = f"{path} is what one rank wrote of a torch.distributed.checkpoint"
            raise FileFormatError(what, f"name its folder: {path.parent}/") from None
        raise error


def _read_by_content(path: Path, key: str | None) -> Contents:
    try:
        if not stat.S_ISREG((status := path.stat()).st_mode):
            raise RequestError(f"{path} is a device or a pipe, and a checkpoint is a file")
        size = status.st_size
        with path.open("rb") as file:
            head = file.read(unknown_files.HEAD_BYTES)
            file.seek(max(size - _ZIP_END, 0))
            end = file.read(_ZIP_END)
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    if not size:
        raise FileFormatError(f"{path} is empty", "the program that wrote it may have been interrupted")
    # Each reader is imported for its own files alone: a look at one of another format need not pay for it.
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        from modelcli.checkpoints.torch_pickle import zip_format

        _refuse_second_format(path, head, end, is_zip=True)
        return zip_format.read(path, key)
    from modelcli.checkpoints.safetensors import reading as safetensors

    if safetensors.looks_like(head, size):
        _refuse_second_format(path, head, end, is_zip=False)
        _refuse_key(key, path, "a safetensors file")
        return safetensors.read(path)
    from modelcli.checkpoints.plain_pickle import reading as plain_pickle
    from modelcli.checkpoints.torch_pickle import legacy_format

    if legacy_format.looks_like(head):
        _refuse_second_format(path, head, end, is_zip=False)
        return legacy_format.read(path, key)
    if plain_pickle.looks_like(head):
        return plain_pickle.read(path, key)
    if kind := unknown_files.name(head):
        raise FileFormatError(f"{path} is {kind.name}", kind.hint)
    what, hint = unknown_files.unknown(head)
    raise FileFormatError(f"{path} {what}", hint)


def _refuse_second_format(path: Path, head: bytes, end: bytes, *, is_zip: bool) -> None:
    """Programs differ in where they look first: a file of two formats is two files, and one would be hidden."""
    if unknown_files.is_tar(head):
        raise FileFormatError(
            f"{path} is a tar archive and a checkpoint at once", "ask whoever made it for one of the two"
        )
    if end.startswith(b"PK\x05\x06") and not is_zip:
        raise FileFormatError(
            f"{path} is a checkpoint and ends as a zip archive does", "ask whoever made it for one of the two"
        )


def _refuse_key(key: str | None, path: Path, what: str) -> None:
    if key is not None:
        raise RequestError(f"--key {key} is for training checkpoints, and {path} is {what}")
