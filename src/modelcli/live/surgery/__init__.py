"""The shared core: `apply` carries out edits on a module, on the meta device or real, and says what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.edits import Edit
from modelcli.edits.add import Add
from modelcli.edits.append import Append
from modelcli.edits.cast import Cast
from modelcli.edits.extract import Extract
from modelcli.edits.freeze import Freeze
from modelcli.edits.init import Init
from modelcli.edits.insert import Insert
from modelcli.edits.remove import Remove
from modelcli.edits.rename import Rename
from modelcli.edits.replace import Replace
from modelcli.edits.unfreeze import Unfreeze
from modelcli.errors import ModelcliError, RequestError
from modelcli.live.surgery import casting, flags, initialising, placing, removing, renaming, replacing
from modelcli.live.surgery.core import Change, Context, Done, brief, count, seed_of
from modelcli.live.surgery.holes import argument_from, shape_with
from modelcli.live.surgery.snapshot import restored_on_error

if TYPE_CHECKING:
    from modelcli.live.inputs import Inputs

#: What carries out each kind of edit. It gives tensors other data, and writes nothing into the data that they have, so
#: that `apply` can put back what it found.
_CARRY_OUT: Mapping[type[Edit], Callable[[nn.Module, Any, Context], Done]] = {
    Replace: replacing.carry_out,
    Add: placing.carry_out,
    Insert: placing.carry_out,
    Append: placing.carry_out,
    Remove: removing.remove,
    Extract: removing.extract,
    Rename: renaming.carry_out,
    Freeze: flags.carry_out,
    Unfreeze: flags.carry_out,
    Init: initialising.carry_out,
    Cast: casting.carry_out,
}


def apply(
    module: nn.Module,
    edits: Sequence[Edit],
    *,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    inputs: Inputs | None = None,
    trusted: bool = True,
) -> Done:
    """Carry out edits in order. `numbers`, else 1, 2, 3, are what they count as, which decides what each draws.

    On a meta module new modules are made on meta and drawn for real when their numbers are asked for; on a real one
    they are made at once. All or nothing: where one raises RequestError, the module is as it was before the first,
    and the message names the edit where there are several.
    """
    _require_editable(module)
    all_done = Done(module, inputs=inputs)
    with restored_on_error(module):
        for position, edit in enumerate(edits):
            number = position + 1 if numbers is None else numbers[position]
            context = Context(seed_of(seed, number), all_done.inputs, trusted)
            try:
                done = _CARRY_OUT[type(edit)](all_done.module, edit, context)
            except ModelcliError as error:
                if len(edits) > 1:
                    error.message = f"edit {position + 1}, {str(edit)!r}: {error.message}"
                raise
            all_done.module = done.module
            all_done.changes += done.changes
            all_done.lines += [(number, line) for change in done.changes for line in change.resolved]
            all_done.notes += done.notes
            all_done.inputs = done.inputs
    return all_done


def _require_editable(module: nn.Module) -> None:
    """Refuse compiled modules with tensors; those without any (a scripted ReLU) are in nobody's way."""
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and part.state_dict():
            raise RequestError(
                f"{path or 'the model'} is a compiled module (torch.jit), whose tensors cannot be edited",
                "edit the model that it was compiled of",
            )


__all__ = ["Change", "Done", "apply", "argument_from", "brief", "count", "seed_of", "shape_with"]
