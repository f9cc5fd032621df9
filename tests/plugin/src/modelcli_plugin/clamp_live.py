"""clamp on a live model, and as a script."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.picking import groups_of
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.source_text import quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import Step
from modelcli.live.sources import named_tensors
from modelcli.live.surgery.changed_values import change_values
from modelcli.model.blueprint import Blueprint
from modelcli.model.dtypes import FLOATING
from modelcli_plugin.clamp import Clamp


def carry_out(module: nn.Module, edit: Clamp, context: Context) -> Applied[nn.Module]:
    blueprint = describe(module)
    names = _picked(edit, blueprint)
    tensors = named_tensors(module)
    changes = []
    for path, below in groups_of(edit.targets, blueprint, names):
        size = sum(tensors[name].numel() for name in below if isinstance(tensors[name], nn.Parameter))
        changes.append(Change(path, edit.name, "as it was", f"from {edit.low:g} to {edit.high:g}", size, size))
    selectors.require_expected(edit.expect, [change.path for change in changes])
    change_values(module, names, lambda values: values.clamp(edit.low, edit.high))
    line = str(replace(edit, targets=tuple(map(selectors.literal, names)), without=(), expect=None))
    return Applied(module, [replace(changes[0], resolved=(line,)), *changes[1:]], inputs=context.inputs)


def _picked(edit: Clamp, blueprint: Blueprint) -> list[str]:
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    floating = [name for name in names if blueprint.by_name[name].dtype in FLOATING]
    if not floating:
        raise RequestError(f"nothing to clamp: {', '.join(edit.targets)} has no floating-point tensors")
    return floating


def script_lines(edit: Clamp, step: Step) -> list[str]:
    ends = f"{edit.low:g}, {edit.high:g}"
    names = _picked(edit, describe(step.before))
    return [f"{access_paths.tensor(step.before, name)}.data.clamp_({ends})" for name in names]


def state_dict_script_lines(edit: Clamp, step: Step, state: State) -> list[str]:
    ends = f"{edit.low:g}, {edit.high:g}"
    names = [f"state[{quoted(name)}]" for name in _picked(edit, describe(step.before))]
    return [f"{name} = {name}.clamp({ends})" for name in names]
