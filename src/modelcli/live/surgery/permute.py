"""permute: change the order of the axes of tensors of a state dict; a model whose class is known cannot take them."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from modelcli.edits.applied import Context
from modelcli.edits.key_surgery import needs_keys
from modelcli.edits.permute import Permute
from modelcli.live.script import new_tensors
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep


def carry_out(module: nn.Module, edit: Permute, context: Context) -> NoReturn:
    """Raise RequestError: the model could not load the tensors."""
    raise needs_keys(edit, type(module).__name__)


# --- scripts ---------------------------------------------------------------------------------------------------------


def state_dict_script_lines(edit: Permute, step: StateDictStep, state: State) -> list[str]:
    order = ", ".join(map(str, edit.dims))
    return new_tensors.in_place(edit.matches(step.before), step.before, f".permute({order})")
