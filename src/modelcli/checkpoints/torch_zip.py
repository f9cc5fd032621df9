"""The format of `torch.save` since 1.6: a zip archive of stored records, with the tree of values as a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from modelcli import record as records
from modelcli.checkpoints import limits, pickles, trees, zip_directory
from modelcli.checkpoints.contents import Contents, Span, identity_of
from modelcli.checkpoints.zip_directory import Entry
from modelcli.errors import FileFormatError, SystemFailureError


def read(path: Path, key: str | None) -> Contents:
    """Read the directory, the pickle and the record of a torch zip file; no tensor's bytes are touched."""
    try:
        identity = identity_of(path)
        with path.open("rb") as file:
            entries = zip_directory.read(file, identity[0], str(path))
            prefix = _prefix(path, entries)
            data = _small(path, file, entries[f"{prefix}data.pkl"])
            byteorder = entries.get(f"{prefix}byteorder")
            if byteorder is not None and _small(path, file, byteorder) not in (b"little", b""):
                raise FileFormatError(f"{path} was written on a big-endian machine", "load and save it with torch")
            record_text = _record_text(path, file, entries.get(f"{prefix}{records.ZIP_RECORD}"))
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None

    def span_of(storage: str, _dtype: str | None) -> Span:
        entry = entries.get(f"{prefix}data/{storage}")
        if entry is None:
            raise FileFormatError(f"{path} is damaged: record {prefix}data/{storage} is missing")
        if not entry.stored:
            raise FileFormatError(f"{path}: record {entry.name} is compressed", zip_directory.STORE)
        return Span(path, entry.offset, entry.nbytes, identity)

    return trees.contents_of(path, pickles.read(data, f"{path}: {prefix}data.pkl", span_of), key, record_text)


def _prefix(path: Path, entries: Mapping[str, Entry]) -> str:
    """The folder in the archive that holds every record of it; torch looks into no other."""
    pickled = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickled:
        raise FileFormatError(*_named(path, entries))
    prefix = pickled[0].removesuffix("data.pkl")
    if len(pickled) > 1:
        raise FileFormatError(f"{path} holds {len(pickled)} files named data.pkl: {', '.join(pickled[:3])}")
    if prefix.count("/") != 1:
        raise FileFormatError(f"{path} holds {pickled[0]}, and torch looks for data.pkl in one folder of the archive")
    if f"{prefix}constants.pkl" in entries:
        raise FileFormatError(f"{path} is a torch.jit archive", "save its state_dict() with torch.save instead")
    if stray := next((name for name in entries if not name.startswith(prefix)), None):
        raise FileFormatError(
            f"{path} holds {stray} beside the folder {prefix}: a second prefix, and torch.save writes one",
            "what another program packed into it has to come out first",
        )
    return prefix


#: What else a zip file may be, by a file in it.
_OTHER_ZIPS = (
    ("keras_metadata.pb", "a Keras model"),
    ("model.weights.h5", "a Keras model"),
    ("[Content_Types].xml", "an Office document"),
    ("META-INF/MANIFEST.MF", "a Java archive"),
    ("AndroidManifest.xml", "an Android package"),
    ("archive_format", "a torch.export archive"),
)


def _named(path: Path, entries: Mapping[str, Entry]) -> tuple[str, str | None]:
    """What a zip file without a data.pkl is, and what to do about it."""
    names = {name.partition("/")[2] for name in entries} | set(entries)
    if kind := next((kind for name, kind in _OTHER_ZIPS if name in names), None):
        return f"{path} is {kind}, not a checkpoint", None
    if names and all(name.endswith(".npy") for name in entries):
        return f"{path} is a NumPy archive (.npz), not a checkpoint", None
    hint = next((f"unpack it: it holds {name}" for name in entries if name.endswith(_SUFFIXES)), None)
    return f"{path} is a zip file, but none that torch.save wrote: it holds no data.pkl", hint


_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


def _small(path: Path, file: BinaryIO, entry: Entry) -> bytes:
    limits.PICKLE_BYTES.check(entry.nbytes, f"{path}: {entry.name}")
    return zip_directory.contents(file, entry, str(path))


def _record_text(path: Path, file: BinaryIO, entry: Entry | None) -> str | None:
    """The record, or None where it is damaged: the tensors are there without it, and so is its copy."""
    if entry is None:
        return None
    try:
        return _small(path, file, entry).decode()
    except (UnicodeDecodeError, FileFormatError):
        return None
