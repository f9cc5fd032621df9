"""Open the archive of a program. All its records are in one folder, as in a checkpoint, or in none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.torch_pickle.zip_format import Archive
from modelcli.errors import FileFormatError, SystemFailureError


def with_file(candidate: Candidate, read: Callable[[Archive, BinaryIO], Contents]) -> Contents:
    """Open the archive of a program, and return the result of `read` on it."""
    where, entries = str(candidate.path), candidate.records
    archive = Archive(candidate.path, candidate.identity, where, _prefix(where, entries), entries)
    try:
        with candidate.path.open("rb") as file:
            return read(archive, file)
    except OSError as error:
        raise SystemFailureError(f"cannot read {candidate.path}: {error.strerror or error}") from None


def _is_exported(names: Mapping[str, Any]) -> bool:
    """Whether an archive with these records is one of `torch.export.save`."""
    ends = ("archive_format", "serialized_exported_program.json")
    return any(name == end or name.endswith(f"/{end}") for name in names for end in ends)


def _prefix(where: str, names: Mapping[str, Any]) -> str:
    """Return the folder that all records of a program are in, with a slash; an empty text if there is none.

    Raises FileFormatError if there are several folders.
    """
    prefixes = {name.partition("/")[0] + "/" if "/" in name else "" for name in names}
    if len(prefixes) != 1 and not _is_exported({name: None for name in names if "/" not in name}):
        raise FileFormatError.damaged(where, f"its records are in {len(prefixes)} folders, but torch writes only one")
    return prefixes.pop() if len(prefixes) == 1 else ""
