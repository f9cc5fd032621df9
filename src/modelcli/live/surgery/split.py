"""split: take tensors of a state dict apart along an axis; a model whose class is known cannot have the parts."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from modelcli.edits.applied import Context
from modelcli.edits.key_surgery import needs_keys
from modelcli.edits.split import Split
from modelcli.live.script import new_tensors
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep


def carry_out(module: nn.Module, edit: Split, context: Context) -> NoReturn:
    """Raise RequestError: the model could not load the parts."""
    raise needs_keys(edit, type(module).__name__)


# --- scripts ---------------------------------------------------------------------------------------------------------


def state_dict_script_lines(edit: Split, step: StateDictStep, state: State) -> list[str]:
    matches = edit.matches(step.before)
    sizes = str(list(edit.sizes)) if edit.sizes else f"value.shape[{edit.dim}] // {len(edit.new)}"
    return new_tensors.of_one(matches, step.before, state, f"torch.split(value, {sizes}, {edit.dim})")
