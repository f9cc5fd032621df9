"""tie: make parameters of the same shape one tensor."""

from __future__ import annotations

from torch import nn

from modelcli.edits.applied import Applied, Context
from modelcli.edits.tie import Tie, tying
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.source_text import InexpressibleError, is_name, quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.sources import named_tensors
from modelcli.live.surgery.core import blueprint_of
from modelcli.live.walking import modules_in


def carry_out(module: nn.Module, edit: Tie, context: Context) -> Applied[nn.Module]:
    found = tying(edit, blueprint_of(module, context))
    tensors = named_tensors(module)
    first = tensors[found.names[0]]
    gone = {id(tensors[name]) for name in found.names[1:]}
    for part in modules_in(module):
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in gone:
                    table[name] = first  # type: ignore[assignment]  # a parameter in the place of a parameter
    return Applied(module, [*found.changes], [*found.notes], context.inputs)


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Tie, step: Step) -> list[str]:
    found = tying(edit, describe(step.before))
    tensors = named_tensors(step.before)
    first = access_paths.tensor_expression(step.before, found.names[0])
    gone = {id(tensors[name]) for name in found.names[1:]}
    return [assignment(step.before, name, first) for name, tensor in tensors.items() if id(tensor) in gone]


def assignment(model: nn.Module, name: str, value: str) -> str:
    """Return the statement that assigns a tensor. Raises InexpressibleError if its name is no identifier."""
    if not is_name(name.rpartition(".")[2]):
        raise InexpressibleError(f"{name} cannot be assigned: its name is no identifier of Python")
    return f"{access_paths.tensor_expression(model, name)} = {value}"


def state_dict_script_lines(edit: Tie, step: StateDictStep, state: State) -> list[str]:
    found = tying(edit, step.before.blueprint)
    gone = {step.before.tensors[name].identity for name in found.names[1:]}
    names = [name for name, tensor in step.before.tensors.items() if tensor.identity in gone]
    return [f"state[{quoted(name)}] = state[{quoted(found.names[0])}]" for name in names]
