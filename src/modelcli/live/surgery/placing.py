"""What add, insert and append share: a new module where none was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.placing import Placing, holder_and_name
from modelcli.language import selectors
from modelcli.language.expressions import Call
from modelcli.live.script.new_modules import new_module as new_module_text
from modelcli.live.script.new_modules import seeded
from modelcli.live.script.step import Step
from modelcli.live.surgery.core import brief, count, put_children, submodule
from modelcli.live.surgery.holes import Placeholder, resolved_calls, resolved_for_keys
from modelcli.live.surgery.new_modules import maker, new_for_keys
from modelcli.live.surgery.state_dicts import new_module
from modelcli.model.paths import joined
from modelcli.model.state_dict import NewModule, StateDictModel

Children = dict[str, nn.Module | None]


def put_new(
    module: nn.Module,
    edit: Placing,
    context: Context,
    path: str,
    arranged: Callable[[nn.Module, nn.Module], tuple[str, Children]],
    *,
    line_names_holder: bool = False,
) -> Applied[nn.Module]:
    """Put the new module of an edit among the children of the module at `path`.

    A placeholder goes there first, so that a forward pass can tell what flows in.

    Args:
        arranged: gives, for that module and the new child, the name of the child and all children in their order.
        line_names_holder: whether the resolved line has the path of that module, and not of the new one.
    """
    place = Placeholder()
    holder = submodule(module, path)
    name, children = arranged(holder, place)
    put_children(holder, children)
    place.train(holder.training)
    there = joined(path, name)
    (call,) = resolved_calls(module, edit.module, [(place, there)], context)
    (new,) = maker(module, [call], context, [(place, there)])()
    holder._modules[name] = new
    line = str(replace(edit, path=selectors.literal(path if line_names_holder else there), module=call))
    return Applied(module, [Change(there, edit.name, "", brief(new), 0, count(new), (line,))], inputs=context.inputs)


def new_for_state_dict(
    edit: Placing, model: StateDictModel, context: Context, holder: str, there: str
) -> tuple[Call, NewModule]:
    """The new module of an edit of a state-dict model, for its place in the module at `holder`, and the call for it."""
    made = model.modules[holder].made
    (call,) = resolved_for_keys(edit.module, [(Placeholder(), there)], context)
    (new,) = new_for_keys(model, [call], context, [(made is None or made.training, there)])
    return call, new_module(new, model.next_identity)


def kind_of(holder: nn.Module) -> str:
    """The type of a module, for an error."""
    return type(holder).__name__


# --- scripts ---------------------------------------------------------------------------------------------------------


def new_child(call: Call, step: Step, path: str) -> tuple[list[str], str]:
    """The statements that set the generator for the new module at `path`, and the call that makes it."""
    new = submodule(step.after, path)
    return seeded(step.seed, [new]), new_module_text(step.script, call, new)


__all__ = ["Children", "holder_and_name", "kind_of", "new_child", "new_for_state_dict", "put_new"]
