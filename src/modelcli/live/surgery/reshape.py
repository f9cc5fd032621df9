"""reshape: give tensors of a state dict another shape; a model whose class is known cannot take them."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from modelcli.edits.applied import Context
from modelcli.edits.key_surgery import needs_keys
from modelcli.edits.reshape import Reshape
from modelcli.live.script import new_tensors
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep


def carry_out(module: nn.Module, edit: Reshape, context: Context) -> NoReturn:
    """Raise RequestError: the model could not load the tensors."""
    raise needs_keys(edit, type(module).__name__)


# --- scripts ---------------------------------------------------------------------------------------------------------


def state_dict_script_lines(edit: Reshape, step: StateDictStep, state: State) -> list[str]:
    shape = ", ".join(map(str, edit.shape))
    return new_tensors.in_place(edit.matches(step.before), step.before, f".reshape({shape})")
