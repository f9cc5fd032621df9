"""append: a new module at the end of a sequence."""

from __future__ import annotations

from modelcli.edits.append import Append
from modelcli.language import selectors
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.step import Step
from modelcli.live.surgery.core import submodule
from modelcli.live.surgery.placing import carry_out, new_child, new_for_state_dict
from modelcli.model.paths import joined

# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Append, step: Step) -> list[str]:
    (holder,) = selectors.select_modules(describe(step.before), [edit.path])
    path = joined(holder, list(submodule(step.after, holder)._modules)[-1])
    before, text = new_child(edit.module, step, path)
    return [*before, access_paths.add_statement(step.before, path, text)]


__all__ = ["carry_out", "new_for_state_dict", "script_lines"]
