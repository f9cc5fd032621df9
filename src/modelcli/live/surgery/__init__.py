"""`apply` applies edits to a module, on the meta device or with values, and returns what changed.

Each edit has a handler, the module that its declaration names: here, or in another package. A handler has

    carry_out(module, edit, context) -> Applied

which gives tensors new data and never writes into their old data, so that `apply` can undo it. If the edit needs torch
for a state-dict model too, the handler has `apply_to_state_dict(edit, model, context) -> Applied`. `script_lines` and
`state_dict_script_lines` write the edit as Python statements: see `modelcli.live.script`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from modelcli.edits import Edit
from modelcli.edits.applied import Applied, Change, Context, apply_in_order, seed_of
from modelcli.errors import RequestError
from modelcli.live.surgery.core import brief, count
from modelcli.live.surgery.holes import argument_from, shape_with
from modelcli.live.surgery.snapshot import restored_on_error

if TYPE_CHECKING:
    from modelcli.edits.source_models import OpensSources
    from modelcli.live.inputs import Inputs
    from modelcli.model.blueprint import Blueprint


def apply(
    module: nn.Module,
    edits: Sequence[Edit],
    *,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    inputs: Inputs | None = None,
    trusted: bool = True,
    blueprint: Blueprint | None = None,
    sources: OpensSources | None = None,
) -> Applied[nn.Module]:
    """Apply edits in order. `numbers` (by default 1, 2, 3, ...) determine the random values that each edit draws.

    In a meta module, new modules are made on meta, and their values are drawn when they are needed; in a real module
    they are made at once. If an edit raises RequestError, the module is unchanged, and the message names the edit if
    there are several. `blueprint` is that of the module, if there is one. `sources` opens other models that edits name.
    """
    _require_editable(module)
    blueprints = iter([blueprint])  # that of the module before the first edit

    def carry_out(now: nn.Module, edit: Edit, number: int, inputs: Inputs | None) -> Applied[nn.Module]:
        context = Context(seed_of(seed, number), inputs, trusted, next(blueprints, None), sources)
        done: Applied[nn.Module] = edit.handler_module().carry_out(now, edit, context)
        return done

    with restored_on_error(module):
        return apply_in_order(module, edits, numbers or range(1, len(edits) + 1), inputs, carry_out)


def _require_editable(module: nn.Module) -> None:
    """Refuse compiled modules that have tensors. Those without tensors (a scripted ReLU) do not matter."""
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and part.state_dict():
            raise RequestError(
                f"{path or 'the model'} is a compiled module (torch.jit), whose tensors cannot be edited",
                "edit the model that it was compiled of",
            )


__all__ = ["Applied", "Change", "apply", "argument_from", "brief", "count", "seed_of", "shape_with"]
