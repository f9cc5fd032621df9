"""clamp with torch: on a live model, on a state dict, and as a script."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from modelcli.edits.applied import Applied, Context
from modelcli.live.describe import describe
from modelcli.live.script import in_place
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.surgery.changed_values import change_values, change_values_of_keys, dense_tensors
from modelcli.live.surgery.core import blueprint_of
from modelcli.model.state_dict import StateDictModel
from modelcli_plugin.clamp import Clamp, clamping


def carry_out(module: nn.Module, edit: Clamp, context: Context) -> Applied[nn.Module]:
    found = clamping(edit, blueprint_of(module, context), dense_tensors(module))
    change_values(module, found.names, partial(_clamped, edit))
    return Applied(module, found.changes, found.notes, context.inputs)


def apply_to_state_dict(edit: Clamp, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
    found = clamping(edit, model.blueprint, dense_tensors(model))
    changed = change_values_of_keys(model, found.names, partial(_clamped, edit))
    return Applied(changed, found.changes, found.notes, context.inputs)


def _clamped(edit: Clamp, values: Tensor) -> Tensor:
    return values.clamp(edit.low, edit.high)


def script_lines(edit: Clamp, step: Step) -> list[str]:
    found = clamping(edit, describe(step.before), dense_tensors(step.before))
    return in_place.of_model(step.before, found.names, _call(edit))


def state_dict_script_lines(edit: Clamp, step: StateDictStep, state: State) -> list[str]:
    found = clamping(edit, step.before.blueprint, dense_tensors(step.before))
    return in_place.of_state_dict(step.before, found.names, _call(edit))


def _call(edit: Clamp) -> str:
    return f".clamp_({edit.low!r}, {edit.high!r})"
