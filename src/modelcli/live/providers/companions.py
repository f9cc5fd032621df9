"""The files beside the weights in a model's folder, which are copied when the edited model is written as a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.checkpoints import formats
from modelcli.checkpoints.storage import Span, identity_of
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.checkpoints.plan import Source

#: Endings of weights in the formats of other libraries. A copy of them would hold the values before the edits.
_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".mlmodel", ".tflite")


def copies(folder: Path | None) -> dict[str, Source]:
    """The files of a folder that are neither weights nor their index, by their names; none without a folder."""
    return {} if folder is None else {path.name: _all_bytes(path) for path in _other_files(folder)}


def notes_on_folders(folder: Path | None) -> tuple[str, ...]:
    """A note on the folders in a model's folder, such as `1_Pooling`, which are not copied."""
    if folder is None:
        return ()
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return (
        (f"modelcli copies files, and no folders: {listed(found, 4)} in {folder} may be needed as well",)
        if found
        else ()
    )


def _other_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        name = path.name
        is_weights = formats.has_known_suffix(name) or formats.is_index(name) or name.endswith(_OTHER_WEIGHTS)
        if path.is_file() and not is_weights and not name.startswith("."):
            yield path


def _all_bytes(path: Path) -> Span:
    identity = identity_of(path)
    return Span(path, 0, identity[0], identity)
