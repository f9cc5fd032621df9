"""Cache the blueprints of installed models on disk, so that showing one again needs no torch.

An entry is one file: on the first line the digest of the rest, then the key that it was made for and the blueprint. It
is written to a temporary file and renamed in one step. An entry that is damaged, half written, or made for another
key is ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcli import providers
from modelcli._version import __version__
from modelcli.errors import ModelcliError, SystemFailureError
from modelcli.files.open_folder import read_regular
from modelcli.model import json_form
from modelcli.model.blueprint import Blueprint

SCHEMA = 4
SUFFIX = ".blueprint"
INDEX_SUFFIX = ".index"


def folder() -> Path:
    """Return the folder of the cache: `$MODELCLI_CACHE`, or modelcli's folder in the user's cache folder.

    Raises SystemFailureError if the user has neither `$HOME` nor an entry in passwd.
    """
    if named := os.environ.get("MODELCLI_CACHE"):
        return Path(named)
    import platformdirs

    try:
        found = platformdirs.user_cache_path("modelcli") / "blueprints"
    except (RuntimeError, KeyError, OSError):
        found = Path()
    if not found.is_absolute():
        raise SystemFailureError(
            "there is no cache: this user has no home folder",
            "set $MODELCLI_CACHE or $XDG_CACHE_HOME to a folder for it",
        )
    return found


def is_off() -> bool:
    """Whether `$MODELCLI_NO_CACHE` is set to anything but 0 or an empty string."""
    return os.environ.get("MODELCLI_NO_CACHE", "0") not in ("", "0")


@dataclass(frozen=True)
class Key:
    """What a blueprint depends on, besides the versions of the installed libraries."""

    reference: str
    weights: str | None
    input_size: tuple[tuple[int, ...], ...] | None
    input_dtype: tuple[str, ...]
    mode: str
    inputs: tuple[str, ...] = ()
    #: The prefix of the model's provider, whose library versions are part of the key.
    prefix: str | None = None
    #: What decides a model that is named by its files: see `Provider.identity`.
    identity: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the key as JSON values, with the library versions that determine what a builder builds."""
        return {
            "schema": SCHEMA,
            "reference": self.reference,
            "weights": self.weights,
            "input_size": None if self.input_size is None else [list(size) for size in self.input_size],
            "input_dtype": list(self.input_dtype),
            "inputs": list(self.inputs),
            "mode": self.mode,
            "identity": self.identity,
            "versions": _versions(self.prefix),
        }


def _versions(prefix: str | None = None) -> dict[str, str | None]:
    return {"modelcli": __version__, **providers.versions_of(prefix)}


def _path(document: Mapping[str, Any], suffix: str) -> Path:
    text = json.dumps(document, sort_keys=True)
    return folder() / f"{_digest(text.encode())}{suffix}"


def _digest(data: bytes) -> str:
    import hashlib  # a look at a file that says what it is needs none

    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Cached:
    """A blueprint from the cache, and what the user should know of the model."""

    blueprint: Blueprint
    notes: tuple[str, ...] = ()


def get(key: Key) -> Blueprint | None:
    """Return the cached blueprint for a key, or None."""
    found = get_with_notes(key)
    return None if found is None else found.blueprint


def get_with_notes(key: Key) -> Cached | None:
    """Return what is cached for a key, or None."""
    try:
        entry = _kept(key.document(), SUFFIX, "cached")
        return Cached(json_form.from_json(entry["blueprint"]), tuple(map(str, entry["notes"])))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def put(key: Key, found: Blueprint, notes: Sequence[str] = ()) -> None:
    """Cache a blueprint, with notes for the user. It is not an error if the cache cannot be written."""
    with contextlib.suppress(ModelcliError):
        _put(key, found, notes)


def _put(key: Key, found: Blueprint, notes: Sequence[str] = ()) -> None:
    _keep(key.document(), SUFFIX, "cached", {"blueprint": json_form.to_json(found), "notes": list(notes)})


def require(key: Key, found: Blueprint) -> None:
    """Cache a blueprint. Raises SystemFailureError if the cache cannot be written."""
    if get(key) is not None:
        return
    where = folder()
    try:
        _put(key, found)
    except ModelcliError as error:
        raise SystemFailureError(
            f"the cache folder {where} cannot be written: {error.message}", "set $MODELCLI_CACHE to another folder"
        ) from None


def index(name: str, prefix: str | None = None) -> Any:
    """Return the JSON values cached under a name, or None. `prefix` is as in `Key`."""
    return _kept(_index_key(name, prefix), INDEX_SUFFIX, "index")


def put_index(name: str, values: Any, prefix: str | None = None) -> None:
    """Cache JSON values under a name, for the installed versions of the libraries."""
    with contextlib.suppress(ModelcliError):
        _keep(_index_key(name, prefix), INDEX_SUFFIX, "index", values)


def _index_key(name: str, prefix: str | None) -> dict[str, Any]:
    key = {"schema": SCHEMA, "index": name, "versions": _versions(prefix)}
    return key if prefix is None else key | {"prefix": prefix}


def _kept(document: Mapping[str, Any], suffix: str, what: str) -> Any:
    """Return the cached value for a key, or None if there is none or it is damaged."""
    try:
        digest, _, body = read_regular(_path(document, suffix)).partition(b"\n")
        if _digest(body).encode() != digest:
            return None
        entry = json.loads(body)
        return entry[what] if entry["key"] == document else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SystemFailureError):
        return None


def _keep(document: Mapping[str, Any], suffix: str, what: str, values: Any) -> None:
    from modelcli.files import atomic

    body = json.dumps({"key": document, what: values}, separators=(",", ":")).encode()
    path = _path(document, suffix)
    with atomic.replacing(path, force=True, through_links=False) as (file, _):
        file.write(_digest(body).encode() + b"\n" + body)


def entries() -> list[Path]:
    """Return the files of blueprints, including half-written ones of killed runs."""
    return _files(SUFFIX)


def _files(suffix: str) -> list[Path]:
    """Return the files that are named like entries; others in the folder are not modelcli's."""
    from modelcli.files import atomic

    name = rf"[0-9a-f]{{64}}{re.escape(suffix)}"
    own = re.compile(rf"{name}|\.{name}\.[0-9a-f]{{8}}{re.escape(atomic.TEMPORARY)}")
    try:
        return sorted(path for path in folder().iterdir() if own.fullmatch(path.name))
    except (OSError, SystemFailureError):
        return []


def clear() -> int:
    """Remove every entry and everything derived from entries, and nothing else. Returns the number of entries."""
    for path in _files(INDEX_SUFFIX):
        with contextlib.suppress(OSError):
            path.unlink()
    removed = 0
    for path in entries():
        with contextlib.suppress(OSError):
            path.unlink()
            removed += 1
    return removed
