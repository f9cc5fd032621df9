"""add: a new child under a name that is free."""

from __future__ import annotations

from torch import nn

from modelcli.edits.add import Add
from modelcli.edits.applied import Applied, Context
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.new_modules import new_statements, own_names
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.surgery.core import blueprint_of, brief
from modelcli.live.surgery.placing import Children, holder_and_name, new_child, new_for_state_dict, put_new
from modelcli.model.paths import joined


def carry_out(module: nn.Module, edit: Add, context: Context) -> Applied[nn.Module]:
    path, own = holder_and_name(blueprint_of(module, context), edit)
    name = selectors.plain(own)
    if name is None:
        raise RequestError(f"add takes a name for the new module, and {own!r} is a pattern", "write the name out")

    def arranged(holder: nn.Module, new: nn.Module) -> tuple[str, Children]:
        _require_free(holder, path, name)
        vars(holder).pop(name, None)  # `self.downsample = None` keeps the place for a child
        return name, {**holder._modules, name: new}

    return put_new(module, edit, context, path, arranged)


def _require_free(holder: nn.Module, path: str, name: str) -> None:
    """Raise RequestError where the module has something of this name, or could not be called by it."""
    there = joined(path, name)
    if (child := holder._modules.get(name)) is not None:
        raise RequestError(
            f"{there} is there already: {brief(child)}", f"replace {quoted(there)} puts another module in its place"
        )
    if name in holder._parameters or name in holder._buffers:
        raise RequestError(f"{there} is a tensor, and no child can have its name", "add takes a name that is free")
    if getattr(holder, name, None) is not None:
        raise RequestError(
            f"{type(holder).__name__} has something else called {name}: no child can have that name",
            "add takes a name that is free",
        )


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Add, step: Step) -> list[str]:
    holder, own = holder_and_name(describe(step.before), edit)
    path = joined(holder, selectors.plain(own) or own)
    before, text = new_child(edit.module, step, path)
    return [*before, access_paths.put_new(step.before, path, text)]


def state_dict_script_lines(edit: Add, step: StateDictStep, state: State) -> list[str]:
    known = step.before.blueprint.by_path
    path = next(module.path for module in step.after.blueprint.modules if module.path not in known)
    lines = new_statements(step.script, edit.module, step.new(path), step.seed)
    return [*lines, *state.put(f"{path}.", own_names(step.new(path)))]


__all__ = ["carry_out", "new_for_state_dict", "script_lines", "state_dict_script_lines"]
