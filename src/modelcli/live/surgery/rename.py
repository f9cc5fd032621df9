"""rename: tensor keys of a state dict under other names; a model whose class is known cannot have them."""

from __future__ import annotations

from torch import nn

from modelcli.edits.applied import Applied, Context
from modelcli.edits.rename import Rename, names_given, renaming
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep
from modelcli.live.surgery.core import blueprint_of


def carry_out(module: nn.Module, edit: Rename, context: Context) -> Applied[nn.Module]:
    """Raise RequestError: what is wrong with the names, else that the model could not load them."""
    blueprint = blueprint_of(module, context)
    tensors = {tensor.name for tensor in blueprint.tensors}
    state = module.state_dict(keep_vars=True)
    beside = {name for name in state if name not in tensors and "." not in name and not name.endswith("_extra_state")}
    renaming(edit, blueprint, names_given(edit, blueprint, state, beside), root_type=type(module).__name__)
    raise AssertionError("a model of a known class does not take other keys")


# --- scripts ---------------------------------------------------------------------------------------------------------


def state_dict_script_lines(edit: Rename, step: StateDictStep, state: State) -> list[str]:
    names = edit.new_names(step.before)
    return state.rename({name: name if new is None else new for name, new in names.items()})
