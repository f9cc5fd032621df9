"""untie: give a tensor under one name, or a view of shared bytes, its own copy."""

from __future__ import annotations

import torch
from torch import nn

from modelcli.checkpoints.copied import Copied
from modelcli.edits.applied import Applied, Context
from modelcli.edits.untie import Untie, untying
from modelcli.live import memory
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.source_text import quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.sources import named_tensors, row_major, tag
from modelcli.live.surgery.core import blueprint_of, submodule
from modelcli.live.surgery.storages import shown_by
from modelcli.live.surgery.tie import assignment


def carry_out(module: nn.Module, edit: Untie, context: Context) -> Applied[nn.Module]:
    found = untying(edit, blueprint_of(module, context), shown_by(module))
    for name in found.names:
        above, _, own = name.rpartition(".")
        holder = submodule(module, above)
        if (old := holder._parameters.get(own)) is not None:
            holder._parameters[own] = nn.Parameter(_copy(old), requires_grad=old.requires_grad)
        else:
            holder._buffers[own] = _copy(named_tensors(module)[name])
    memory.require(memory.bytes_of(module), str(edit))
    return Applied(module, [*found.changes], [], context.inputs)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of a tensor; on the meta device its values come from the same source."""
    if not tensor.is_meta:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    made = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
    tag(made, Copied(row_major(tensor)))
    return made


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Untie, step: Step) -> list[str]:
    found = untying(edit, describe(step.before), shown_by(step.before))
    parameters = dict(step.before.named_parameters(remove_duplicate=False))
    lines = []
    for name in found.names:
        copy = f"{access_paths.tensor_expression(step.before, name)}.detach().clone()"
        if name in parameters:
            flag = "" if parameters[name].requires_grad else ", requires_grad=False"
            step.script.imports.add("from torch import nn")
            copy = f"nn.Parameter({copy}{flag})"
        lines.append(assignment(step.before, name, copy))
    return lines


def state_dict_script_lines(edit: Untie, step: StateDictStep, state: State) -> list[str]:
    found = untying(edit, step.before.blueprint, step.before.shown)
    return [f"state[{quoted(name)}] = state[{quoted(name)}].clone()" for name in found.names]
