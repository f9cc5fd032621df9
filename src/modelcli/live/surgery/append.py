"""append: a new module at the end of a sequence."""

from __future__ import annotations

from torch import nn

from modelcli.edits.append import Append
from modelcli.edits.applied import Applied, Context
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.step import Step
from modelcli.live.surgery.core import blueprint_of, submodule
from modelcli.live.surgery.placing import Children, kind_of, new_child, new_for_state_dict, put_new
from modelcli.model.paths import joined, shown


def carry_out(module: nn.Module, edit: Append, context: Context) -> Applied[nn.Module]:
    path = selectors.select_one(blueprint_of(module, context), edit.path, edit.name)

    def arranged(holder: nn.Module, new: nn.Module) -> tuple[str, Children]:
        return _appended(holder, path, new)

    return put_new(module, edit, context, path, arranged, line_names_holder=True)


def _appended(holder: nn.Module, path: str, new: nn.Module) -> tuple[str, Children]:
    """The children with a new one at the end, called by their number, as PyTorch's own `append` does."""
    name = str(len(holder._modules))
    if not isinstance(holder, nn.Sequential | nn.ModuleList):
        raise RequestError(
            f"append needs a Sequential or ModuleList; {shown(path)} {kind_of(holder)} is neither",
            f"add {quoted(joined(path, 'NAME'))} MODULE puts a child with a name at the end",
        )
    if name in holder._modules:
        raise RequestError(
            f"{shown(path)} has {name} children, and one of them is called {name} already",
            f"add {quoted(joined(path, 'NAME'))} MODULE puts a child with another name at the end",
        )
    return name, {**holder._modules, name: new}


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Append, step: Step) -> list[str]:
    (holder,) = selectors.select_modules(describe(step.before), [edit.path])
    path = joined(holder, list(submodule(step.after, holder)._modules)[-1])
    before, text = new_child(edit.module, step, path)
    return [*before, access_paths.put_new(step.before, path, text)]


__all__ = ["carry_out", "new_for_state_dict", "script_lines"]
