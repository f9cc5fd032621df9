"""clamp with torch: on a live model, on a state dict, and as a script."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from modelcli.edits.applied import Applied, Context
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.source_text import quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.surgery.changed_values import change_values, change_values_of_keys
from modelcli.live.surgery.core import blueprint_of
from modelcli.model.state_dict import StateDictModel
from modelcli_plugin.clamp import Clamp, clamping


def carry_out(module: nn.Module, edit: Clamp, context: Context) -> Applied[nn.Module]:
    names, changes = clamping(edit, blueprint_of(module, context))
    change_values(module, names, partial(_clamped, edit))
    return Applied(module, changes, inputs=context.inputs)


def apply_to_state_dict(edit: Clamp, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
    names, changes = clamping(edit, model.blueprint)
    return Applied(change_values_of_keys(model, names, partial(_clamped, edit)), changes, inputs=context.inputs)


def _clamped(edit: Clamp, values: Tensor) -> Tensor:
    return values.clamp(edit.low, edit.high)


def script_lines(edit: Clamp, step: Step) -> list[str]:
    names, _ = clamping(edit, describe(step.before))
    return [f"{access_paths.tensor(step.before, name)}.data.clamp_({edit.low!r}, {edit.high!r})" for name in names]


def state_dict_script_lines(edit: Clamp, step: StateDictStep, state: State) -> list[str]:
    names, _ = clamping(edit, step.before.blueprint)
    tensors = [f"state[{quoted(name)}]" for name in names]
    return [f"{tensor} = {tensor}.clamp({edit.low!r}, {edit.high!r})" for tensor in tensors]
