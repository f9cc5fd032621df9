"""Read the `config.json` of a model's folder without the library that wrote it. It is untrusted input like any file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.files.open_folder import read_regular

#: The name of a configuration in the libraries of Hugging Face and in timm.
NAME = "config.json"
#: The largest size in bytes: ten times that of the largest configuration on the Hub, with labels for 22,000 classes.
MAX_BYTES = 10_000_000


def configuration_in(folder: Path) -> dict[str, Any] | None:
    """Return the configuration of a folder; None if it has no `config.json`.

    Raises:
        FileFormatError: the file is too large, or not a JSON object.
        SystemFailureError: the file cannot be read.
    """
    path = folder / NAME
    try:
        if not path.is_file():
            return None
        if (size := path.stat().st_size) > MAX_BYTES:
            raise FileFormatError(f"{path} has {size:,} bytes; a configuration has at most {MAX_BYTES:,}")
        found = json.loads(read_regular(path), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} holds a {type(found).__name__}; a configuration is a JSON object")
    return found


def identity_of(folder: Path) -> str | None:
    """Return a cache key for the model in a folder: a digest of its `config.json` and of its list of other files.

    Of the other files, only names, sizes, modification times and inodes are used, so that none of them is read. None if
    the configuration cannot be read.
    """
    import hashlib  # a look at a file needs none

    try:
        if (path := folder / NAME).stat().st_size > MAX_BYTES:
            return None
        digest = hashlib.sha256(read_regular(path))
        for entry in sorted(folder.iterdir()):
            if entry.is_file():
                status = entry.stat()
                entry_key = (entry.name, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)
                digest.update(repr(entry_key).encode())
    except (OSError, SystemFailureError):
        return None
    return digest.hexdigest()


def digest_of(text: bytes) -> str:
    """Return the SHA-256 digest of a configuration's bytes."""
    import hashlib

    return hashlib.sha256(text).hexdigest()


def digest_in(folder: Path) -> str | None:
    """Return the digest of the configuration in a folder; None if it cannot be read."""
    path = folder / NAME
    try:
        return digest_of(read_regular(path)) if path.stat().st_size <= MAX_BYTES else None
    except OSError:
        return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found
