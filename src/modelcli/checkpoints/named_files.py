"""Files that another file names: they have to stay inside its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from modelcli.errors import FileFormatError


def inside(index: Path, file: str) -> Path:
    """The path of a file that an index names; it has to lie inside the folder of the index, links followed."""
    parts = (*PurePosixPath(file).parts, *PureWindowsPath(file).parts)
    absolute = PurePosixPath(file).is_absolute() or PureWindowsPath(file).drive or PureWindowsPath(file).root
    if not file or "\0" in file or absolute or ".." in parts:
        raise FileFormatError(f"{index} names {file!r}, which is outside its folder")
    path = index.parent / file
    # A cache of downloads keeps the index and its shards side by side in one folder, and links to both from another.
    homes = {index.parent.resolve(), index.resolve().parent}
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise FileFormatError(f"{index} names {file!r}, a link to outside its folder")
    if not path.is_file():
        raise FileFormatError(f"{index} names {file!r}, which is not there", "a shard may not be downloaded yet")
    return path
