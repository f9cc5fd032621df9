"""Find the files that another file names. They must be inside its folder.

Such names are the content of a file, which may come from anyone: an index must not make modelcli read, compare or
replace a file elsewhere, and a link to outside of the folder is refused like a path to it. Names that come from listing
a folder are not looked up here: the files of ranks, the states of DeepSpeed, and the safetensors files of
`torch.distributed.checkpoint`. A link among those is the user's own, as is a link named on the command line, and it may
lead anywhere: several disks may hold the files of one run.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath, PureWindowsPath

from modelcli.errors import FileFormatError

_EDIT_INDEX = "put all files of the checkpoint into one folder, and name them there"


def homes_of(index: Path) -> frozenset[Path]:
    """Return the folders in which the files that an index names may be: its own, and that of the file it is a link to.

    Hugging Face's cache keeps the index and its shards in one folder, and another folder has links to them.
    """
    return frozenset((index.parent.resolve(), index.resolve().parent))


def inside(index: Path, file: str, homes: Collection[Path] | None = None) -> Path:
    """Return the path of a file that an index names. Raises FileFormatError if it is missing or outside the folder.

    Args:
        index: the file that names it.
        file: its path as the index spells it.
        homes: what `homes_of` returns, for a caller that asks for many files; None to find it out.
    """
    parts = (*PurePosixPath(file).parts, *PureWindowsPath(file).parts)
    absolute = PurePosixPath(file).is_absolute() or PureWindowsPath(file).drive or PureWindowsPath(file).root
    if not file or "\0" in file or absolute or ".." in parts:
        raise FileFormatError(f"{index} names the file {file!r}, which is outside its folder", _EDIT_INDEX)
    path = index.parent / file
    real = path.resolve()
    if not any(real.is_relative_to(home) for home in (homes_of(index) if homes is None else homes)):
        raise FileFormatError(
            f"{index} names the file {file!r}, which is a link to a file outside its folder", _EDIT_INDEX
        )
    if not path.is_file():
        raise FileFormatError(
            f"{index} names the file {file!r}, which does not exist",
            "download the missing file, or wait until its download is complete",
        )
    return path
