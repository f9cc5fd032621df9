"""Reading checkpoints without torch: names, shapes, dtypes, and where each tensor's bytes lie. Nothing is executed."""

from __future__ import annotations

from pathlib import Path

from modelcli.checkpoints import formats
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.storage import Span, Storage
from modelcli.errors import RequestError, SystemFailureError

__all__ = ["CompositeEntry", "Contents", "Span", "Storage", "TensorEntry", "accounts_beside", "read"]


def read(path: Path, *, key: str | None = None) -> Contents:
    """Read what a checkpoint holds, by its content and never by its suffix.

    A folder is read by the index of shards in it, or by the `.metadata` of `torch.distributed.checkpoint`. `key` names
    the state dict inside a training checkpoint (`a.b` for one inside another). Raises FileFormatError for a file that
    is corrupt or no checkpoint.
    """
    try:
        is_folder = path.is_dir()
        format_, path = formats.index_in(path) if is_folder else (None, path)
        if not path.exists():
            raise RequestError(f"no such file: {path}")
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    file = Candidate(path)
    if format_ is None and not file.is_zip:  # which no index is: most files are told apart by that
        format_ = formats.index_format(path)
    return formats.read_file(file, key) if format_ is None else formats.read_index(format_, file, key)


def accounts_beside(path: Path) -> list[Path]:
    """What lies beside an index of shards or a `.metadata` that `path` names, from which others may load the folder.

    That is another of these, or a file with all weights under a name that programs look for.
    """
    if path.is_dir():
        _, path = formats.index_in(path)
    if formats.index_format(path) is None:
        return []
    whole = formats.whole_files()
    found = (other for other in path.parent.iterdir() if other.name in whole or formats.is_index(other.name))
    return sorted(other for other in found if other != path and other.is_file())
