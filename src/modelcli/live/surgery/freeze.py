"""freeze, unfreeze: `requires_grad`."""

from __future__ import annotations

from torch import nn

from modelcli.edits.applied import Applied, Context
from modelcli.edits.flags import Flags, flagging
from modelcli.edits.freeze import Freeze
from modelcli.edits.unfreeze import Unfreeze
from modelcli.live.describe import describe
from modelcli.live.script.flags import requires_grad_statements
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.sources import state_flag
from modelcli.live.surgery.core import blueprint_of


def carry_out(module: nn.Module, edit: Flags, context: Context) -> Applied[nn.Module]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = flagging(edit, blueprint_of(module, context), parameters.keys())
    for name in found.names:
        state_flag(parameters[name], edit.trains)
    return Applied(module, [*found.changes], [*found.notes], context.inputs)


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Freeze | Unfreeze, step: Step) -> list[str]:
    return requires_grad_statements(step.before, describe(step.before), describe(step.after))


def state_dict_script_lines(edit: Freeze | Unfreeze, step: StateDictStep, state: State) -> list[str]:
    return ["# a state dict holds no requires_grad: nothing to do"]
