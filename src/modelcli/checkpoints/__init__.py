"""Read checkpoints without torch and without executing anything: names, shapes, dtypes, and where the bytes are."""

from __future__ import annotations

from pathlib import Path

from modelcli.checkpoints import formats
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.storage import Span, Storage
from modelcli.errors import RequestError, SystemFailureError

__all__ = ["CompositeEntry", "Contents", "Span", "Storage", "TensorEntry", "other_entry_points", "read"]


def read(path: Path, *, key: str | None = None) -> Contents:
    """Read the contents of a checkpoint. Its content decides the format, never its suffix.

    Args:
        path: a file, or a folder with an index of shards or the `.metadata` of `torch.distributed.checkpoint`.
        key: the state dict inside a training checkpoint (`a.b` for one inside another); None to find it.

    Raises:
        RequestError: there is no such file, or it contains several state dicts.
        FileFormatError: the file is damaged or not a checkpoint.
    """
    try:
        is_folder = path.is_dir()
        format_, path = formats.index_in(path) if is_folder else (None, path)
        if not path.exists():
            raise RequestError(f"no such file: {path}")
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    file = Candidate(path)
    if format_ is None and not file.is_zip:  # a zip archive is never an index, and most files are zip archives
        format_ = formats.index_format(path)
    return formats.read_file(file, key) if format_ is None else formats.read_index(format_, file, key)


def other_entry_points(path: Path) -> list[Path]:
    """Return the other files by which a program could load the folder of an index of shards or a `.metadata`.

    These are other indexes, and files with all weights under a name that programs look for.
    """
    if path.is_dir():
        _, path = formats.index_in(path)
    if formats.index_format(path) is None:
        return []
    whole = formats.whole_files()
    found = (other for other in path.parent.iterdir() if other.name in whole or formats.is_index(other.name))
    return sorted(other for other in found if other != path and other.is_file())
