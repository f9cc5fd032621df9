"""insert: a new module before a position of a sequence."""

from __future__ import annotations

from modelcli.edits.insert import Insert
from modelcli.language import selectors
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.new_modules import new_statements, tensor_names
from modelcli.live.script.source_text import InexpressibleError, quoted
from modelcli.live.script.state import State, renumber_keys
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.surgery.core import is_numbered, submodule
from modelcli.live.surgery.placing import LiveHolder, carry_out, holder_and_name, new_child, new_for_state_dict
from modelcli.model.paths import joined

# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Insert, step: Step) -> list[str]:
    above, own = holder_and_name(describe(step.before), edit)
    holder = submodule(step.before, above)
    name = edit.name_in(LiveHolder(holder, above), own)
    path = joined(above, name)
    before, text = new_child(edit.module, step, path)
    if edit.after and not is_numbered(holder):
        at = access_paths.module_expression(step.before, above)
        position = list(edit.arranged(LiveHolder(holder, above), name)).index(name)
        return [
            *before,
            f"children = list({at}._modules.items())",
            f"children.insert({position}, ({quoted(name)}, {text}))",
            f"{at}._modules = dict(children)",
        ]
    if not is_numbered(holder):
        raise InexpressibleError(f"{above or 'the model'} is no sequence with children 0, 1, 2")
    return [*before, *access_paths.insert_statements(step.before, path, text)]


def state_dict_script_lines(edit: Insert, step: StateDictStep, state: State) -> list[str]:
    if edit.after:
        raise InexpressibleError("the children of a sequence have names")
    above, _, position = edit.path.rpartition(".")
    (holder,) = selectors.select_modules(step.before.blueprint, [above or "."])
    names = list(step.before.keys)
    shifted = renumber_keys(names, holder, lambda number: number + (number >= int(position)), state)
    path = joined(holder, position)
    lines = new_statements(step.script, edit.module, step.new(path), step.seed)
    return [*shifted, *lines, *state.put_new_module(f"{path}.", tensor_names(step.new(path)))]


__all__ = ["carry_out", "new_for_state_dict", "script_lines", "state_dict_script_lines"]
