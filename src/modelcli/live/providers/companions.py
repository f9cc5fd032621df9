"""The files beside the weights in a model's folder, which are copied when the edited model is written as a folder.

The folder may come from anybody, so nothing is copied from outside of it: a link that leads out is left out. Only the
cache of Hugging Face's libraries keeps the files of a model elsewhere, and there links into its own blobs are followed.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.checkpoints import formats
from modelcli.checkpoints.storage import Span, identity_of
from modelcli.files.checksum_lists import is_list
from modelcli.wording import is_or_are, listed

if TYPE_CHECKING:
    from modelcli.checkpoints.plan import Source

#: Endings of weights in the formats of other libraries. A copy of them would hold the values before the edits.
_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".mlmodel", ".tflite")
#: How many names a note lists.
_MOST = 4


@dataclass(frozen=True)
class Companions:
    """What is copied from a model's folder, by the names of the files, and notes on what is not."""

    files: dict[str, Source]
    notes: tuple[str, ...] = ()


def of(folder: Path | None) -> Companions:
    """The files of a folder that are neither weights nor their index; none without a folder.

    Folders such as `1_Pooling`, links out of the folder, links to nothing, pipes and devices are named in notes.
    So are lists of checksums: they are of the files before the edit. Weights and names with a dot at their start are
    left out without a note.
    """
    files: dict[str, Source] = {}
    folders: list[str] = []
    others: list[str] = []
    lists: list[str] = []
    if folder is None:
        return Companions(files)
    homes = _homes(folder)
    for path in sorted(folder.iterdir()):
        if _is_weights(path.name) or path.name.startswith("."):
            continue
        if is_list(path.name):
            lists.append(path.name)
            continue
        real = _resolved(path)
        if real is None:
            others.append(f"{path.name} (a link to nothing)")
        elif stat.S_ISDIR(mode := real.lstat().st_mode):
            folders.append(path.name)
        elif not stat.S_ISREG(mode):
            others.append(f"{path.name} (no file)")
        elif path.is_symlink() and not any(real.is_relative_to(home) for home in homes):
            others.append(f"{path.name} (a link to {path.readlink()}, which is outside)")
        else:
            identity = identity_of(real)
            files[path.name] = Span(real, 0, identity[0], identity)
    notes = (*_note_on_folders(folder, folders), *_note_on_others(folder, others), *_note_on_lists(lists))
    return Companions(files, notes)


def _is_weights(name: str) -> bool:
    return formats.has_known_suffix(name) or formats.is_index(name) or name.endswith(_OTHER_WEIGHTS)


def _resolved(path: Path) -> Path | None:
    """Where a path leads; None where there is nothing, or nothing that the user may see."""
    try:
        return Path(os.path.realpath(path, strict=True))
    except OSError:
        return None


def _homes(folder: Path) -> list[Path]:
    """The folders that the files of a model's folder may be in.

    In huggingface_hub's cache the folder is `models--NAME/snapshots/COMMIT`. Its files are links into
    `models--NAME/blobs`, and what is there may be a link into the `blobs` that all models of the cache share.
    """
    home = Path(os.path.realpath(folder))
    repository = home.parent.parent
    if home.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return [home]
    return [home, repository / "blobs", repository.parent / "blobs"]


def _note_on_folders(folder: Path, names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (f"modelcli copies files, and no folders: {listed(names, _MOST)} in {folder} may be needed as well",)


def _note_on_lists(names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{listed(names, _MOST)} {is_or_are(len(names))} not copied: the checksums are of the files before the edit",
    )


def _note_on_others(folder: Path, names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"of {folder} {listed(names, _MOST)} {is_or_are(len(names))} not copied: "
        "put a file there if the model needs it",
    )
