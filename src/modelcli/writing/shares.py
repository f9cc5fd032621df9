"""Which rank writes which files of a folder, and the check that all ranks are about to write the same folder."""

from __future__ import annotations

import hashlib

from modelcli.checkpoints.layout import Bytes, BytesLayout, CopyLayout, FolderLayout
from modelcli.checkpoints.storage import Span
from modelcli.ranks import Group
from modelcli.ranks.sharing import evenly


def own_files(folder: FolderLayout, group: Group) -> list[str]:
    """Return the names of the files that this rank writes, in their order.

    Files with tensors are shared out by their bytes. Rank 0 writes the index, the configuration and other small files.
    """
    shared = [name for name, layout in folder.files.items() if not isinstance(layout, BytesLayout | CopyLayout)]
    ranks = dict(zip(shared, evenly([folder.files[name].nbytes for name in shared], group.size), strict=True))
    return [name for name in folder.files if ranks.get(name, 0) == group.rank]


def require_same(folder: FolderLayout, group: Group) -> None:
    """Compare the plans of all ranks. Raises GroupEndedError if another rank is about to write other bytes.

    Two plans are the same if their files have the same names, sizes and headers, and if the same bytes of the same
    files, unchanged, are in the same places. Values that are computed count by their place and size.
    """
    if group.size > 1:
        group.require_same(digest(folder), "plan")


def digest(folder: FolderLayout) -> bytes:
    """Return a digest of what is about to be written."""
    found = hashlib.sha256()
    for name, layout in folder.files.items():
        found.update(repr((name, layout.nbytes)).encode())
        for offset, source in layout.parts():
            if isinstance(source, Bytes):
                found.update(source.data)
            elif isinstance(source, Span):
                found.update(f"{offset} {source.offset} {source.nbytes} {source.path} {source.identity}".encode())
            else:
                files = sorted((str(path), identity) for path, identity in source.files())
                found.update(f"{offset} {source.nbytes} {files}".encode())
    return found.digest()
