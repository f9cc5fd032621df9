"""stack: put numbered tensors of a state dict into one; a model whose class is known cannot have the result."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from modelcli.edits.applied import Context
from modelcli.edits.key_surgery import needs_keys
from modelcli.edits.stack import Stack
from modelcli.live.script import new_tensors
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep


def carry_out(module: nn.Module, edit: Stack, context: Context) -> NoReturn:
    """Raise RequestError: the model could not load the result."""
    raise needs_keys(edit, type(module).__name__)


# --- scripts ---------------------------------------------------------------------------------------------------------


def state_dict_script_lines(edit: Stack, step: StateDictStep, state: State) -> list[str]:
    return new_tensors.of_several(edit.matches(step.before), step.before, state, f"torch.stack(parts, {edit.dim})")
