"""What add, insert and append share: a new module where none was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.placing import Placing, holder_and_name
from modelcli.language.expressions import Call
from modelcli.live.script.new_modules import constructor_call, seed_statements
from modelcli.live.script.step import Step
from modelcli.live.surgery.core import blueprint_of, brief, count, put_children, submodule
from modelcli.live.surgery.holes import Placeholder, resolved_calls, resolved_for_keys
from modelcli.live.surgery.new_modules import maker, new_for_keys
from modelcli.live.surgery.state_dicts import new_module
from modelcli.model.paths import joined
from modelcli.model.state_dict import NewModule, StateDictModel


@dataclass(frozen=True)
class LiveHolder:
    """A live module that gets a child."""

    module: nn.Module
    path: str

    @property
    def type(self) -> str:
        return type(self.module).__name__

    @property
    def children(self) -> Sequence[str]:
        return list(self.module._modules)

    @property
    def is_sequence(self) -> bool:
        return isinstance(self.module, nn.Sequential | nn.ModuleList)

    def child(self, name: str) -> str | None:
        child = self.module._modules.get(name)
        return None if child is None else brief(child)

    def has_tensor(self, name: str) -> bool:
        return name in self.module._parameters or name in self.module._buffers

    def has_attribute(self, name: str) -> bool:
        return getattr(self.module, name, None) is not None


def carry_out(module: nn.Module, edit: Placing, context: Context) -> Applied[nn.Module]:
    """Put the new module of an edit among the children of the module that it names.

    A placeholder goes there first, so that a forward pass can tell what flows in.
    """
    path, word = edit.place(blueprint_of(module, context))
    holder = submodule(module, path)
    described = LiveHolder(holder, path)
    name = edit.name_in(described, word)
    place = Placeholder()
    children = {
        new: place if old is None else holder._modules[old] for new, old in edit.arranged(described, name).items()
    }
    vars(holder).pop(name, None)  # `self.downsample = None` keeps the place for a child
    put_children(holder, children)
    place.train(holder.training)
    there = joined(path, name)
    (call,) = resolved_calls(module, edit.module, [(place, there)], context)
    (new,) = maker(module, [call], context, [(place, there)])()
    holder._modules[name] = new
    line = str(edit.settled(path, name, call))
    return Applied(module, [Change(there, edit.name, "", brief(new), 0, count(new), (line,))], inputs=context.inputs)


def new_for_state_dict(
    edit: Placing, model: StateDictModel, context: Context, holder: str, there: str
) -> tuple[Call, NewModule]:
    """The new module of an edit of a state-dict model, for its place in the module at `holder`, and the call for it."""
    made = model.modules[holder].made
    (call,) = resolved_for_keys(edit.module, [(Placeholder(), there)], context)
    (new,) = new_for_keys(model, [call], context, [(made is None or made.training, there)])
    return call, new_module(new, model.next_identity)


# --- scripts ---------------------------------------------------------------------------------------------------------


def new_child(call: Call, step: Step, path: str) -> tuple[list[str], str]:
    """The statements that set the generator for the new module at `path`, and the call that makes it."""
    new = submodule(step.after, path)
    return seed_statements(step.seed, [new]), constructor_call(step.script, call, new)


__all__ = ["carry_out", "holder_and_name", "new_child", "new_for_state_dict"]
