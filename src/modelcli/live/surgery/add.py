"""add: a new child under a name that is free."""

from __future__ import annotations

from modelcli.edits.add import Add
from modelcli.language import selectors
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.new_modules import new_statements, tensor_names
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.surgery.placing import carry_out, holder_and_name, new_child, new_for_state_dict
from modelcli.model.paths import joined

# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Add, step: Step) -> list[str]:
    holder, own = holder_and_name(describe(step.before), edit)
    path = joined(holder, selectors.plain(own) or own)
    before, text = new_child(edit.module, step, path)
    return [*before, access_paths.add_statement(step.before, path, text)]


def state_dict_script_lines(edit: Add, step: StateDictStep, state: State) -> list[str]:
    known = step.before.blueprint.by_path
    path = next(module.path for module in step.after.blueprint.modules if module.path not in known)
    lines = new_statements(step.script, edit.module, step.new(path), step.seed)
    return [*lines, *state.put_new_module(f"{path}.", tensor_names(step.new(path)))]


__all__ = ["carry_out", "new_for_state_dict", "script_lines", "state_dict_script_lines"]
