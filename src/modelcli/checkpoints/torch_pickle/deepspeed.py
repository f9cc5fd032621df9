"""Recognise checkpoints of DeepSpeed, and name the program that makes one state dict of them.

With ZeRO-3, each rank writes model states with empty tensors, and the values into its optimizer states; with ZeRO-1 and
ZeRO-2 the model states are complete. `zero_to_fp32.py`, which DeepSpeed writes beside its checkpoints, joins the files.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modelcli.checkpoints.entries import TensorEntry
from modelcli.errors import FileFormatError, RequestError
from modelcli.wording import counted, listed

_FILE = re.compile(r"(bf16_)?(zero_pp_rank_\d+_)?(mp_rank|layer|expp?_rank)_?\d+.*_(model|optim)_states\.pt")
_STEP = re.compile(r"global_step\d+")
SCRIPT = "zero_to_fp32.py"


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
            f"{path} holds only {which}optimizer states of one rank of DeepSpeed, not the model", _hint(path.parent)
        )
    tensors = list(_tensors_in(tree.get("module")))
    if tensors and all(0 in tensor.shape for tensor in tensors):
        raise FileFormatError(
            f"{path} holds model states of one rank of DeepSpeed ZeRO-3 without values: "
            f"{counted(len(tensors), 'tensor')} of shape [0], whose values are in the optimizer states of all ranks",
            _hint(path.parent),
        )
    ranks = tree.get("mp_world_size")
    if isinstance(ranks, int) and ranks > 1:
        return (
            f"{path.name} holds one of the {ranks} parts into which DeepSpeed's model parallelism splits the model",
        )
    return ()


def _is_deepspeed(tree: dict[Any, Any]) -> bool:
    return any(key in tree for key in ("ds_version", "ds_config", "param_shapes"))


def _tensors_in(value: Any) -> Iterator[TensorEntry]:
    if isinstance(value, dict):
        yield from (item for item in value.values() if isinstance(item, TensorEntry))


def require_no_checkpoint(folder: Path, names: Sequence[str]) -> None:
    """Raise RequestError if a folder holds a checkpoint of DeepSpeed. `names` are the names of its files."""
    steps = [name for name in names if _STEP.fullmatch(name) and (folder / name).is_dir()]
    states = [name for name in names if _FILE.fullmatch(name)]
    if not states and not (steps and ("latest" in names or SCRIPT in names)):
        return
    home = folder if steps or "latest" in names else folder.parent
    inside = states or [f"{step}/{path.name}" for step in steps for path in sorted((folder / step).iterdir())]
    whole = [name for name in inside if name.endswith("mp_rank_00_model_states.pt") and "zero_pp" not in name]
    hint = _hint_in(home)
    if whole:
        hint = f"{folder / whole[-1]} holds the weights in the dtype of training; {hint}"
    raise RequestError(
        f"{folder} is a checkpoint of DeepSpeed ({listed(inside, 2)}), which modelcli does not read", hint
    )


def _hint(folder: Path) -> str:
    return _hint_in(folder.parent if _STEP.fullmatch(folder.name) else folder)


def _hint_in(home: Path) -> str:
    """Return the hint with the command that makes a state dict of the checkpoint in a folder."""
    script = home / SCRIPT
    program = str(script) if script.exists() else SCRIPT
    return (
        f"python {shlex.quote(program)} {shlex.quote(str(home))} OUT joins the files of all ranks into one state dict"
    )
