"""What add, insert and append share: a new module where none was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.placing import Placing
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.expressions import Call
from modelcli.live.build import Bare
from modelcli.live.script.new_modules import new_module, seeded
from modelcli.live.script.step import Step
from modelcli.live.surgery.core import brief, count, put_children, submodule
from modelcli.live.surgery.holes import Placeholder, resolved_calls
from modelcli.live.surgery.new_modules import maker
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import joined

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


def holder_and_name(blueprint: Blueprint, edit: Placing) -> tuple[str, str]:
    """The path of the module that gets a child, and the last step of the edit's path, as it is written.

    Raises RequestError where there is no such module, and for a path that is none of a child.
    """
    selector = selectors.parse(edit.path)
    if selector.type is not None:
        raise RequestError(f"{edit.name} takes a path, and {edit.path!r} asks for a type", "write the path out")
    *above, own = selector.components or ("",)
    if not own:
        raise RequestError(f"{edit.name} takes the path of a new module, not of the model itself", edit.example_line())
    return selectors.select_one(blueprint, ".".join(above) or ".", edit.name), own


def kind_of(holder: nn.Module) -> str:
    """The type of a module, for an error."""
    return "(of unknown type)" if isinstance(holder, Bare) else type(holder).__name__


# --- scripts ---------------------------------------------------------------------------------------------------------


def new_child(call: Call, step: Step, path: str) -> tuple[list[str], str]:
    """The statements that set the generator for the new module at `path`, and the call that makes it."""
    new = submodule(step.after, path)
    return seeded(step.seed, [new]), new_module(step.script, call, new)
