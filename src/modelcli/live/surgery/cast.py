"""cast: floating-point tensors as another dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from modelcli.checkpoints.scaled_weights import scaled_weights
from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.cast import Cast
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live.describe import describe, dtype_name, floating_dtype
from modelcli.live.script.dtypes import CAST_VIEWS, casts
from modelcli.live.script.source_text import STATEMENTS, call, loop, quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import Step
from modelcli.live.sources import converted, is_lazy, named_tensors
from modelcli.live.surgery.core import names_of_one, tie_notes
from modelcli.live.surgery.picking import groups_of
from modelcli.live.surgery.storages import byte_span, has_storage, key_of, view_anew, viewers
from modelcli.model.blueprint import Blueprint
from modelcli.model.dtypes import FLOATING
from modelcli.model.paths import ancestors, shown
from modelcli.wording import counted, listed


def carry_out(module: nn.Module, edit: Cast, context: Context) -> Applied[nn.Module]:
    dtype: torch.dtype = getattr(torch, edit.dtype)
    blueprint = describe(module)
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    tensors = named_tensors(module)
    apart = [name for name in names if name not in tensors]
    floating = [name for name in names if name in tensors and tensors[name].is_floating_point()]
    if not floating:
        raise RequestError(
            f"nothing to cast: {', '.join(edit.targets)} has no floating-point tensors",
            "modelcli params shows the dtypes",
        )
    _refuse_scaled(blueprint, floating)
    groups = groups_of(edit.targets, blueprint, floating)
    selectors.require_expected(edit.expect, [path for path, _ in groups])
    changes, notes = [], tie_notes(names_of_one(blueprint), floating, "cast")
    if apart:
        stay = "stays as it is: it is" if len(apart) == 1 else "stay as they are: each is"
        notes.append(f"{listed(apart, 3)} {stay} no dense tensor")
    for path, below in groups:
        own = {id(tensors[name]): tensors[name] for name in below}
        before = dict.fromkeys(dtype_name(tensor.dtype) for tensor in own.values())
        if list(before) == [edit.dtype]:
            notes.append(f"{shown(path)} is {edit.dtype} already")
            continue
        params = {key: tensor for key, tensor in own.items() if isinstance(tensor, nn.Parameter)}
        size = sum(tensor.numel() for tensor in params.values() if not is_lazy(tensor))
        held = [tensor for tensor in own.values() if not is_lazy(tensor)]
        nbytes = sum(t.numel() * t.itemsize for t in held), sum(t.numel() for t in held) * dtype.itemsize
        changes.append(Change(path, edit.name, ", ".join(before), edit.dtype, size, size, nbytes=nbytes))
    chosen = {id(tensors[name]): tensors[name] for name in floating if tensors[name].dtype != dtype}
    _convert(module, chosen, dtype, {id(tensor): name for name, tensor in reversed(tensors.items())})
    inputs = context.inputs
    if inputs is not None:
        inputs = inputs.with_floating(floating_dtype(module) or inputs.floating)
    if changes:
        line = str(Cast(targets=tuple(_resolved_targets(blueprint, groups)), dtype=edit.dtype))
        changes[0] = replace(changes[0], resolved=(line,))
    return Applied(module, changes, notes, inputs)


def _refuse_scaled(blueprint: Blueprint, names: Sequence[str]) -> None:
    """Raise RequestError where a weight or its scale would be cast apart from the other: neither means much alone."""
    pairs = scaled_weights({tensor.name: tensor.dtype for tensor in blueprint.tensors})
    if (name := next((name for name in names if name in pairs), None)) is None:
        return
    pair = pairs[name]
    many = len({pairs[name].weight for name in names if name in pairs})
    more = f", and {counted(many - 1, 'weight')} more like it" if many > 1 else ""
    raise RequestError(
        f"{pair.weight} is {pair.how}, whose values are its elements times {pair.scale}{more}: a cast of either by "
        "itself gives other weights",
        "cast what is not scaled: --except leaves weights and scales out; the program that wrote the file can "
        "dequantize it",
    )


def _convert(
    module: nn.Module, chosen: Mapping[int, torch.Tensor], dtype: torch.dtype, names: Mapping[int, str]
) -> None:
    """Convert tensors, by `id`, each storage once. Looks at all of them before it changes any."""
    for tensor in chosen.values():
        _require_conversion(tensor.dtype, dtype, names[id(tensor)])
        if not tensor.is_meta and tensor.is_neg():
            tensor.data = tensor.data.resolve_neg()
    parts: list[list[torch.Tensor]] = []
    for views in viewers(module).values():
        for before in {view.dtype for view in views if id(view) in chosen}:
            part = [view for view in views if id(view) in chosen and view.dtype == before]
            _refuse_overlap(part, [view for view in views if all(view is not other for other in part)], names)
            parts.append(part)
    for part in parts:
        storage, before = part[0].untyped_storage(), part[0].dtype
        flat = torch.empty(0, dtype=before, device=part[0].device)
        flat.set_(storage, 0, (storage.nbytes() // before.itemsize,), (1,))
        view_anew(part, converted(flat, dtype), dtype)
    for tensor in chosen.values():
        if not has_storage(tensor):
            tensor.data = tensor.data.to(dtype)
        if tensor.is_leaf and tensor.grad is not None:
            tensor.grad = tensor.grad.to(dtype)


def _require_conversion(before: torch.dtype, after: torch.dtype, name: str) -> None:
    try:
        torch.empty(1, dtype=before).to(after)
    except RuntimeError:
        raise RequestError(
            f"torch does not convert {dtype_name(before)} to {dtype_name(after)}, and {name} is {dtype_name(before)}",
            "float8_e4m3fn takes one byte an element"
            if dtype_name(after).startswith("float4")
            else "--except leaves it",
        ) from None


def _refuse_overlap(part: Sequence[torch.Tensor], others: Iterable[torch.Tensor], names: Mapping[int, str]) -> None:
    """Raise RequestError where tensors that are converted and tensors that are not show the same bytes."""
    spans = [(*byte_span(view), True, names[id(view)]) for view in part if view.numel()]
    spans += [(*byte_span(view), False, names[id(view)]) for view in others if view.numel()]
    furthest: dict[bool, tuple[int, str]] = {True: (0, ""), False: (0, "")}
    for start, end, converts, name in sorted(spans):
        reached, other = furthest[not converts]
        if start < reached:
            inside, outside = (name, other) if converts else (other, name)
            raise RequestError(
                f"{inside} and {outside} show the same bytes, and a cast of {inside} alone would part them",
                f"name both: {inside} {outside}",
            )
        furthest[converts] = max(furthest[converts], (end, name))


def _resolved_targets(blueprint: Blueprint, groups: Sequence[tuple[str, list[str]]]) -> list[str]:
    """Literal paths: a module where all its floating-point tensors were chosen, else the tensors one by one."""
    there = Counter(path for t in blueprint.tensors if t.dtype in FLOATING for path in ancestors(t.name))
    found: list[str] = []
    for path, below in groups:
        found += [selectors.literal(path)] if there[path] == len(below) else map(selectors.literal, below)
    return found


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Cast, step: Step) -> list[str]:
    return casts(step.script, step.before, describe(step.before), describe(step.after))


def state_dict_script_lines(edit: Cast, step: Step, state: State) -> list[str]:
    """What converts tensors; those that share a storage together, so that they share one again."""
    now = describe(step.after).by_name
    tensors = named_tensors(step.before)
    changed = [t.name for t in describe(step.before).tensors if now[t.name].dtype != t.dtype]
    storages: dict[object, list[str]] = {}
    for name in changed:
        alone = not has_storage(tensors[name])
        storages.setdefault(name if alone else (key_of(tensors[name]), tensors[name].dtype), []).append(name)
    lines, dtype = [], f"torch.{edit.dtype}"
    for names in storages.values():
        if len(names) > 1:
            step.script.helpers.setdefault(CAST_VIEWS)
            lines += call("cast_views", [f"state[{quoted(name)}]" for name in names], dtype)
    rest = [name for names in storages.values() for name in names if len(names) == 1]
    if len(rest) <= STATEMENTS:
        return [*lines, *(f"state[{quoted(name)}] = state[{quoted(name)}].to({dtype})" for name in rest)]
    floating = (now[name].dtype for name in now if now[name].dtype in FLOATING)
    if all(map(torch.is_tensor, step.before.state_dict().values())) and all(found == edit.dtype for found in floating):
        value = f"value.to({dtype}) if value.is_floating_point() else value"
        return [*lines, f"state = {{key: {value} for key, value in state.items()}}"]
    return [*lines, *loop("key", rest, f"state[key] = state[key].to({dtype})")]
