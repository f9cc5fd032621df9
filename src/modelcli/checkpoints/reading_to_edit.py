"""Read a checkpoint in order to edit it: keep what can be written again, and refuse objects that cannot."""

from __future__ import annotations

from pathlib import Path

from modelcli import checkpoints
from modelcli.checkpoints.contents import Contents, foreign_names
from modelcli.checkpoints.entries import CompositeEntry
from modelcli.errors import UnsafeError
from modelcli.language.references import Source
from modelcli.wording import listed


def read_to_edit(path: Path, source: Source, notes: list[str]) -> Contents:
    """Read a checkpoint in order to edit it.

    Objects of foreign classes beside the state dict are kept if they are plain values. Otherwise the checkpoint is
    refused or, if `source.tensors_only` is set, read without them.

    Args:
        path: the file or folder.
        source: how the user named the model.
        notes: gets the notes about kept and dropped objects.

    Raises:
        UnsafeError: the checkpoint has objects that only running code could load.
        RequestError, FileFormatError, SystemFailureError: as `checkpoints.read`.
    """
    contents = checkpoints.read(path, key=source.key)
    if source.bare_keys:
        contents = contents.without_record()
    if not contents.foreign:
        return contents
    if contents.is_program:
        return contents.without_objects()
    from modelcli.checkpoints.torch_pickle import inert_objects

    names = foreign_names(contents.foreign, most=5)
    if not source.tensors_only and inert_objects.all_inert(contents):
        notes.append(
            f"objects of {names} beside the tensors are copied without loading them; a file that has them fails "
            "check --safe, and torch.load needs weights_only=False for it"
        )
        return contents
    if not source.tensors_only:
        raise UnsafeError(
            f"{path} holds objects of {names}, which only running code could load",
            "--tensors-only keeps the tensors and drops everything else",
        )
    _require_all_tensors(contents)
    notes.append(f"took only the tensors of {path.name} and dropped objects of {names}")
    return contents.without_objects()


def _require_all_tensors(contents: Contents) -> None:
    """Raise UnsafeError if dropping the objects of foreign classes would drop tensors too."""
    from modelcli.checkpoints.torch_pickle.composite_tensors import class_of

    for name, entry in contents.tensors.items():
        if isinstance(entry, CompositeEntry) and (kind := class_of(entry)) is not None:
            raise UnsafeError(
                f"{name} in {contents.path} is a {kind}, which only the code of its class can make: --tensors-only "
                "cannot keep it",
                f"load the file where {kind.partition('.')[0]} is installed, and save plain tensors, such as "
                "tensor.dequantize()",
            )
    if lost := [*contents.inner, *contents.unseen]:
        raise UnsafeError(
            f"--tensors-only would drop {listed(lost, 3)} in {contents.path}, which may be tensors of the model",
            "load the file with the program that made it, save model.state_dict() there, and use that file",
        )
