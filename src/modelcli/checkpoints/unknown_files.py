"""Recognise files that are not checkpoints by their first bytes, and say what to do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modelcli.checkpoints.format import Candidate
from modelcli.errors import FileFormatError


class Kind(NamedTuple):
    """What a file is, for a sentence that starts with its path, and a hint for what to do with it."""

    name: str
    hint: str


_CHECKPOINT = "name a file that torch.save wrote, a safetensors file, or a folder of shards"
_UNPACK = "unpack it, and name the checkpoint in it"
_CONVERT = "modelcli reads what PyTorch loads: convert it with the program that wrote it"

_STARTS = (
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", _UNPACK)),
    (b"\x1f\x8b", Kind("a gzip file", _UNPACK)),
    (b"BZh", Kind("a bzip2 file", _UNPACK)),
    (b"\xfd7zXZ\0", Kind("an xz file", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Kind("a zstd file", _UNPACK)),
    (b"\x04\x22\x4d\x18", Kind("an lz4 file", _UNPACK)),
    (b"Rar!\x1a\x07", Kind("a rar archive", _UNPACK)),
    (b"version https://git-lfs", Kind("a git-lfs pointer, not the file it points to", "run git lfs pull")),
    (b"GGUF", Kind("a GGUF file", _CONVERT)),
    (b"lmgg", Kind("a GGML file", _CONVERT)),
    (b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file, as Keras writes it", _CONVERT)),
    (b"\x93NUMPY", Kind("a NumPy array", _CONVERT)),
    (b"TFL3", Kind("a TensorFlow Lite model", _CONVERT)),
    (b"%PDF", Kind("a PDF document", _CHECKPOINT)),
    (b"\x7fELF", Kind("a program or library for Linux", _CHECKPOINT)),
    (b"MZ", Kind("a program or library for Windows", _CHECKPOINT)),
)
_HTML = Kind("an HTML page, so the download failed", "open its address in a browser, which may ask you to log in")


@dataclass(frozen=True)
class Known:
    """What the hints need to know of the formats that there are.

    Attributes:
        index_pattern: how the index of a folder of shards is called.
        is_checkpoint_name: whether a file of this name may be a checkpoint.
        problems: what is wrong with formats that cannot be loaded, one of which might have recognised the file.
    """

    index_pattern: str
    is_checkpoint_name: Callable[[str], bool]
    problems: Sequence[str] = ()


def recognise(head: bytes, index_pattern: str) -> Kind | None:
    """Return what a file with these first bytes is, if it is of a kind that people may take for a checkpoint."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return _HTML
    found = next((kind for start, kind in _STARTS if head.startswith(start)), None)
    if found is not None:
        return found
    if head[257:262] == b"ustar":
        return Kind(
            "a tar archive", "unpack it, and name the checkpoint in it; torch has not written tar files since 0.1.10"
        )
    if head[4:8] == b"TFL3":
        return Kind("a TensorFlow Lite model", _CONVERT)
    if head[4:8] == b"ET12" or head[4:6] == b"ET":
        return Kind("an ExecuTorch program", _CONVERT)
    if _is_onnx(head):
        return Kind("an ONNX model", _CONVERT)
    if text.startswith((b"{", b"[")):
        hint = f"name the folder or a file of weights; the index of a folder of shards must be called {index_pattern}"
        return Kind("a JSON file", hint)
    return None


def _is_onnx(head: bytes) -> bool:
    """Whether a file starts like a `ModelProto`: ir_version, then producer_name or a later field."""
    return len(head) > 4 and head[0] == 0x08 and 0 < head[1] < 0x20 and head[2] in (0x12, 0x1A, 0x3A, 0x42)


def error(file: Candidate, known: Known) -> FileFormatError:
    """Return the error for a file that no format recognises."""
    what, hint = _explained(file, known)
    if known.problems:
        hint = "; ".join(([] if hint is None else [hint]) + list(known.problems))
    return FileFormatError(what, hint)


def _explained(file: Candidate, known: Known) -> tuple[str, str | None]:
    if file.is_zip:
        return _zip(file, known)
    if kind := recognise(file.head, known.index_pattern):
        return f"{file.path} is {kind.name}", kind.hint
    return f"{file.path} is not a checkpoint: it starts with {file.head[:8]!r}", _CHECKPOINT


#: Kinds of zip files, by a file that they contain.
_ZIPS = (
    ("keras_metadata.pb", "a Keras model"),
    ("model.weights.h5", "a Keras model"),
    ("[Content_Types].xml", "an Office document"),
    ("META-INF/MANIFEST.MF", "a Java archive"),
    ("AndroidManifest.xml", "an Android package"),
)


def _zip(file: Candidate, known: Known) -> tuple[str, str | None]:
    """Return what a zip archive without a checkpoint is, and a hint for what to do with it."""
    names = {name.partition("/")[2] for name in file.records} | set(file.records)
    if kind := next((kind for name, kind in _ZIPS if name in names), None):
        return f"{file.path} is {kind}, not a checkpoint", None
    if names and all(name.endswith(".npy") for name in file.records):
        return f"{file.path} is a NumPy archive (.npz), not a checkpoint", None
    inside = next((name for name in file.records if known.is_checkpoint_name(name)), None)
    hint = None if inside is None else f"unpack it, and name {inside}"
    return f"{file.path} is a zip file that torch.save did not write: it contains no data.pkl", hint
