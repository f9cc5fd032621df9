"""clamp on a live model, and as a script."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.picking import groups_of
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.source_text import quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import Step
from modelcli.live.sources import AnySource, Computed, named_tensors, real_storage, require_source
from modelcli.live.surgery.storages import view_anew, viewers
from modelcli.model.blueprint import Blueprint
from modelcli.model.dtypes import FLOATING
from modelcli_plugin.clamp import Clamp

#: Of a view in its storage: dtype, offset, sizes, strides.
_Place = tuple[torch.dtype, int, torch.Size, tuple[int, ...]]


def carry_out(module: nn.Module, edit: Clamp, context: Context) -> Applied[nn.Module]:
    blueprint = describe(module)
    names = _picked(edit, blueprint)
    tensors = named_tensors(module)
    chosen = {id(tensors[name]) for name in names}
    changes = []
    for path, below in groups_of(edit.targets, blueprint, names):
        size = sum(tensors[name].numel() for name in below if isinstance(tensors[name], nn.Parameter))
        changes.append(Change(path, edit.name, "as it was", f"from {edit.low:g} to {edit.high:g}", size, size))
    selectors.require_expected(edit.expect, [change.path for change in changes])
    for views in viewers(module).values():
        places = [_place(view) for view in views if id(view) in chosen]
        if places:
            source = require_source(views[0])
            compute = partial(_clamped, source, places, edit.low, edit.high)
            view_anew(views, Computed(source.nbytes, compute, (source,), step=max(source.nbytes, 1)))
    line = str(replace(edit, targets=tuple(map(selectors.literal, names)), without=(), expect=None))
    return Applied(module, [replace(changes[0], resolved=(line,)), *changes[1:]], inputs=context.inputs)


def _picked(edit: Clamp, blueprint: Blueprint) -> list[str]:
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    floating = [name for name in names if blueprint.by_name[name].dtype in FLOATING]
    if not floating:
        raise RequestError(f"nothing to clamp: {', '.join(edit.targets)} has no floating-point tensors")
    return floating


def _place(view: torch.Tensor) -> _Place:
    return view.dtype, int(view.storage_offset()), view.size(), view.stride()


def _clamped(
    source: AnySource, places: list[_Place], low: float, high: float, start: int, nbytes: int
) -> torch.UntypedStorage:
    storage = real_storage(source.part(0, source.nbytes)).cpu().clone()
    for dtype, offset, size, stride in places:
        torch.empty(0, dtype=dtype).set_(storage, offset, size, stride).clamp_(low, high)
    part = torch.empty(0, dtype=torch.uint8).set_(storage)[start : start + nbytes]
    return part.clone().untyped_storage()


def script_lines(edit: Clamp, step: Step) -> list[str]:
    ends = f"{edit.low:g}, {edit.high:g}"
    names = _picked(edit, describe(step.before))
    return [f"{access_paths.tensor(step.before, name)}.data.clamp_({ends})" for name in names]


def state_dict_script_lines(edit: Clamp, step: Step, state: State) -> list[str]:
    ends = f"{edit.low:g}, {edit.high:g}"
    names = [f"state[{quoted(name)}]" for name in _picked(edit, describe(step.before))]
    return [f"{name} = {name}.clamp({ends})" for name in names]
