"""Reading a checkpoint that is to be edited: what of it can be carried on, and what is refused."""

from __future__ import annotations

from pathlib import Path

from modelcli import checkpoints
from modelcli.checkpoints.contents import Contents, foreign_names
from modelcli.checkpoints.entries import CompositeEntry
from modelcli.errors import UnsafeError
from modelcli.language.references import Source
from modelcli.wording import listed


def read_to_edit(path: Path, source: Source, notes: list[str]) -> Contents:
    """Read a checkpoint. Objects of foreign classes in it are kept where they are inert beside the state dict; else it
    is refused, or cleaned of them where `source` asks to."""
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
            f"objects of {names} beside the tensors are copied as they are, and none is loaded: "
            "check --safe fails on what holds them, and torch.load needs weights_only=False"
        )
        return contents
    if not source.tensors_only:
        raise UnsafeError(
            f"{path} holds objects of {names}, which only running code could load",
            "--tensors-only takes the tensors and drops everything else",
        )
    _require_all_tensors(contents)
    notes.append(f"took the tensors of {path.name} alone: objects of {names} were dropped")
    return contents.without_objects()


def _require_all_tensors(contents: Contents) -> None:
    """Raise UnsafeError where a file holds tensors that would be dropped with the objects of foreign classes."""
    from modelcli.checkpoints.torch_pickle.composite_tensors import class_of

    for name, entry in contents.tensors.items():
        if isinstance(entry, CompositeEntry) and (kind := class_of(entry)) is not None:
            raise UnsafeError(
                f"{name} in {contents.path} is a {kind}, which only its own code makes again: --tensors-only cannot "
                "keep it",
                f"load the file where {kind.partition('.')[0]} is installed, and save plain tensors: "
                "tensor.dequantize()",
            )
    if lost := [*contents.inner, *contents.unseen]:
        raise UnsafeError(
            f"{listed(lost, 3)} in {contents.path} would be dropped with the objects of foreign classes",
            "save model.state_dict() where the model was made, and use that file",
        )
