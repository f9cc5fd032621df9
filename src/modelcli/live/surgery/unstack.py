"""unstack: take tensors of a state dict apart; a model whose class is known cannot have the parts."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from modelcli.edits.applied import Context
from modelcli.edits.key_surgery import needs_keys
from modelcli.edits.unstack import Unstack
from modelcli.live.script import new_tensors
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep


def carry_out(module: nn.Module, edit: Unstack, context: Context) -> NoReturn:
    """Raise RequestError: the model could not load the parts."""
    raise needs_keys(edit, type(module).__name__)


# --- scripts ---------------------------------------------------------------------------------------------------------


def state_dict_script_lines(edit: Unstack, step: StateDictStep, state: State) -> list[str]:
    return new_tensors.of_one(edit.matches(step.before), step.before, state, f"torch.unbind(value, {edit.dim})")
