"""cast: floating-point tensors as another dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from modelcli.edits.applied import Applied, Context
from modelcli.edits.cast import Cast, casting, refuse_overlap, require_conversion
from modelcli.live.describe import describe, dtype_name, floating_dtype
from modelcli.live.script.dtypes import CAST_VIEWS, cast_statements
from modelcli.live.script.source_text import STATEMENTS, call, loop, quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.sources import converted, named_tensors
from modelcli.live.surgery.core import blueprint_of
from modelcli.live.surgery.storages import byte_span, has_storage, replace_storage, viewers
from modelcli.model.dtypes import FLOATING


def carry_out(module: nn.Module, edit: Cast, context: Context) -> Applied[nn.Module]:
    dtype: torch.dtype = getattr(torch, edit.dtype)
    tensors = named_tensors(module)
    found = casting(edit, blueprint_of(module, context), tensors.keys())
    chosen = {id(tensors[name]): tensors[name] for name in found.names}
    _convert(module, chosen, dtype, {id(tensor): name for name, tensor in reversed(tensors.items())})
    inputs = context.inputs
    if inputs is not None:
        inputs = inputs.with_floating(floating_dtype(module) or inputs.floating)
    return Applied(module, [*found.changes], [*found.notes], inputs)


def _convert(
    module: nn.Module, chosen: Mapping[int, torch.Tensor], dtype: torch.dtype, names: Mapping[int, str]
) -> None:
    """Convert tensors, by `id`, each storage once. Looks at all of them before it changes any."""
    for tensor in chosen.values():
        require_conversion(dtype_name(tensor.dtype), dtype_name(dtype), names[id(tensor)])
        if not tensor.is_meta and tensor.is_neg():
            tensor.data = tensor.data.resolve_neg()
    parts: list[list[torch.Tensor]] = []
    for views in viewers(module).values():
        for before in {view.dtype for view in views if id(view) in chosen}:
            part = [view for view in views if id(view) in chosen and view.dtype == before]
            converted_views = set(map(id, part))
            refuse_overlap(
                (*byte_span(view), id(view) in converted_views, names[id(view)]) for view in views if view.numel()
            )
            parts.append(part)
    for part in parts:
        storage, before = part[0].untyped_storage(), part[0].dtype
        flat = torch.empty(0, dtype=before, device=part[0].device)
        flat.set_(storage, 0, (storage.nbytes() // before.itemsize,), (1,))
        replace_storage(part, converted(flat, dtype), dtype)
    for tensor in chosen.values():
        if not has_storage(tensor):
            tensor.data = tensor.data.to(dtype)
        if tensor.is_leaf and tensor.grad is not None:
            tensor.grad = tensor.grad.to(dtype)


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Cast, step: Step) -> list[str]:
    return cast_statements(step.script, step.before, describe(step.before), describe(step.after))


def state_dict_script_lines(edit: Cast, step: StateDictStep, state: State) -> list[str]:
    """What converts tensors; those that share a storage together, so that they share one again."""
    now = step.after.blueprint.by_name
    tensors = step.before.tensors
    changed = [t.name for t in step.before.blueprint.tensors if now[t.name].dtype != t.dtype]
    storages: dict[object, list[str]] = {}
    for name in changed:
        storages.setdefault((tensors[name].storage, tensors[name].dtype), []).append(name)
    lines, dtype = [], f"torch.{edit.dtype}"
    for names in storages.values():
        if len(names) > 1:
            step.script.helpers.setdefault(CAST_VIEWS)
            lines += call("cast_views", [f"state[{quoted(name)}]" for name in names], dtype)
    rest = [name for names in storages.values() for name in names if len(names) == 1]
    if len(rest) <= STATEMENTS:
        return [*lines, *(f"state[{quoted(name)}] = state[{quoted(name)}].to({dtype})" for name in rest)]
    floating = (now[name].dtype for name in now if now[name].dtype in FLOATING)
    if not step.before.inert and all(found == edit.dtype for found in floating):
        value = f"value.to({dtype}) if value.is_floating_point() else value"
        return [*lines, f"state = {{key: {value} for key, value in state.items()}}"]
    return [*lines, *loop("key", rest, f"state[key] = state[key].to({dtype})")]
