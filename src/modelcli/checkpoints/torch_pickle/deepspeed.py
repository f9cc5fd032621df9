"""Say of a file of one rank of DeepSpeed that it is only a part of the model, and which folder is the whole.

With ZeRO-3, each rank writes model states with empty tensors, and the values into its optimizer states; with ZeRO-1 and
ZeRO-2 the model states are complete. `checkpoints/deepspeed` reads the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelcli.checkpoints.entries import TensorEntry
from modelcli.errors import FileFormatError
from modelcli.wording import counted


def notes_of(path: Path, tree: Any) -> tuple[str, ...]:
    """Return the notes about a file that DeepSpeed wrote; none for any other file.

    Raises FileFormatError if the file holds no values of the model.
    """
    if not isinstance(tree, dict) or not _is_deepspeed(tree):
        return ()
    state = tree.get("optimizer_state_dict")
    if isinstance(state, dict) and "module" not in tree:
        stage = state.get("zero_stage")
        which = f"ZeRO-{stage} " if isinstance(stage, int) else ""
        raise FileFormatError(
            f"{path} holds only {which}optimizer states of one rank of DeepSpeed, not the model", _hint(path)
        )
    if empty := _placeholders(tree):
        raise FileFormatError(
            f"{path} holds model states of one rank of DeepSpeed ZeRO-3 without values: "
            f"{counted(empty, 'tensor')} of shape [0], whose values are in the optimizer states of all ranks",
            _hint(path),
        )
    ranks = tree.get("mp_world_size")
    if isinstance(ranks, int) and ranks > 1:
        return (
            f"{path.name} holds one of the {ranks} parts into which DeepSpeed's model parallelism splits the model",
        )
    return ()


def _is_deepspeed(tree: dict[Any, Any]) -> bool:
    return any(key in tree for key in ("ds_version", "ds_config", "param_shapes"))


def _placeholders(tree: dict[Any, Any]) -> int:
    """Return how many parameters have an empty tensor in their place, although their shape is stated."""
    module, groups = tree.get("module"), tree.get("param_shapes")
    if not isinstance(module, dict) or not isinstance(groups, list):
        return 0
    names = {name for group in groups if isinstance(group, dict) for name in group}
    entries = [entry for name, entry in module.items() if name in names and isinstance(entry, TensorEntry)]
    return sum(entry.shape == (0,) for entry in entries)


def _hint(path: Path) -> str:
    return f"name its folder, in which modelcli joins the files of all ranks: {path.parent}/"
