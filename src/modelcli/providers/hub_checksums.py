"""The SHA-256 of downloaded files, as huggingface_hub notes it. Does not import that library."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from modelcli.files.open_folder import read_regular

_DIGEST = re.compile(r"[0-9a-f]{64}")
#: The largest size in bytes of what is noted of a file: three lines.
_MAX_BYTES = 1000


def of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the SHA-256 that is noted of a file, and where.

    In the cache a large file is a link to a blob that has its SHA-256 as name; the names of small ones are digests of
    git, which are left out. `hf download --local-dir` notes it beside the files; it counts if the file was not changed
    afterwards.
    """
    blob = Path(os.path.realpath(path))
    if blob.parent.name == "blobs" and _DIGEST.fullmatch(blob.name):
        yield blob.name, "the names of blobs in huggingface_hub's cache"
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    with contextlib.suppress(OSError, ValueError):
        if not note.is_file() or note.stat().st_size > _MAX_BYTES:
            return
        _, digest, when = read_regular(note).decode().split("\n")[:3]
        if _DIGEST.fullmatch(digest) and path.stat().st_mtime <= float(when) + 1:
            yield digest, "the metadata of hf download"
