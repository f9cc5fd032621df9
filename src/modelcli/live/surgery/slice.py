"""slice: keep, reorder and repeat the children of sequences."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from modelcli.edits.applied import Applied, Context
from modelcli.edits.slice import (
    Slice,
    change_of,
    not_numbered,
    notes,
    numbered_children,
    positions,
    prefix_of,
    sliced_paths,
)
from modelcli.errors import RequestError
from modelcli.live import memory
from modelcli.live.describe import describe
from modelcli.live.meta_models import separate_meta_copy
from modelcli.live.script import access_paths
from modelcli.live.script.source_text import STATEMENTS, InexpressibleError, quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.surgery.core import blueprint_of, count, is_meta, put_children, submodule
from modelcli.model.paths import joined
from modelcli.model.state_dict import StateDictModel


def carry_out(module: nn.Module, edit: Slice, context: Context) -> Applied[nn.Module]:
    paths = _distinct(module, sliced_paths(edit, blueprint_of(module, context)))
    changes, kept_of = [], []
    plans = [(path, submodule(module, path), *_kept(submodule(module, path), edit, path)) for path in paths]
    for path, holder, kept, names in plans:
        before, old = count(holder), list(holder._modules.values())
        children: dict[str, nn.Module | None] = {}
        seen: set[int] = set()
        for name, number in zip(names, kept, strict=True):
            child = old[number]
            repeated = number in seen and not edit.tied and child is not None
            children[name] = _copy(module, child) if repeated and child is not None else child
            seen.add(number)
        put_children(holder, children)
        changes.append(change_of(edit, path, (len(old), before), (len(kept), count(holder)), kept))
        kept_of.append((kept, len(old)))
    memory.require(memory.bytes_of(module), str(edit))
    return Applied(module, changes, notes(kept_of), context.inputs)


def _distinct(module: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return the first path of each module: a shared sequence is sliced once, under all of its names."""
    return list({id(submodule(module, path)): path for path in reversed(paths)}.values())[::-1]


def _kept(holder: nn.Module, edit: Slice, path: str) -> tuple[list[int], list[str]]:
    """Return the positions of the children that are kept, and the names that they get.

    Children called 0, 1, 2 or layer_0, layer_1 are numbered anew; others keep their names, so none can be repeated.
    """
    names = list(holder._modules)
    if isinstance(holder, nn.Sequential | nn.ModuleList) and not names:
        raise RequestError(f"{path or 'the model itself'} is a {type(holder).__name__} without children")
    if not isinstance(holder, nn.Sequential | nn.ModuleList):
        raise not_numbered(path, type(holder).__name__)
    kept = positions(edit, len(names), path)
    prefix = prefix_of(names)
    if prefix is not None and names == [f"{prefix}{number}" for number in range(len(names))]:
        return kept, [f"{prefix}{place}" for place in range(len(kept))]
    if len(set(kept)) < len(kept):
        twice = next(number for place, number in enumerate(kept) if number in kept[:place])
        raise RequestError(
            f"{names[twice]} of {path or 'the model'} would be there twice under one name",
            "a child whose name is no number can be kept once: name each position once",
        )
    return kept, [names[number] for number in kept]


def _copy(module: nn.Module, child: nn.Module) -> nn.Module:
    """Return a copy of a child with its own tensors; on the meta device their values come from the same sources."""
    return separate_meta_copy(child) if is_meta(module) else copy.deepcopy(child)


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Slice, step: Step) -> list[str]:
    paths = _distinct(step.before, sliced_paths(edit, describe(step.before)))
    return [line for path in paths for line in _script_lines(edit, path, step)]


def _script_lines(edit: Slice, path: str, step: Step) -> list[str]:
    holder = submodule(step.before, path)
    kept, names = _kept(holder, edit, path)
    at = access_paths.module_expression(step.before, path)
    lines = [
        f"children = list({at}._modules.values())",
        f"children = [children[number] for number in {_numbers(kept)}]",
    ]
    if len(set(kept)) < len(kept) and not edit.tied:
        step.script.imports.add("import copy")
        lines.append(
            "children = [copy.deepcopy(child) if any(child is old for old in children[:number]) else child "
            "for number, child in enumerate(children)]"
        )
    prefix = prefix_of(names)
    if prefix is not None and names == [f"{prefix}{place}" for place in range(len(names))]:
        name = f"{quoted(prefix)} + str(number)" if prefix else "str(number)"
        lines.append(f"{at}._modules = {{{name}: child for number, child in enumerate(children)}}")
    else:
        lines.append(f"{at}._modules = dict(zip([{', '.join(map(quoted, names))}], children))")
    return lines


def _numbers(kept: Sequence[int]) -> str:
    """Return the positions as Python writes them: `range(6)`, or `(*range(24), *range(8, 32))`."""
    runs: list[list[int]] = []
    for number in kept:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(runs) == 1 and len(kept) > 1:
        return _run(runs[0])
    if max(map(len, runs)) == 1 or len(kept) <= STATEMENTS:
        return f"({', '.join(map(str, kept))},)" if len(kept) == 1 else f"({', '.join(map(str, kept))})"
    return f"({', '.join(f'*{_run(run)}' if len(run) > 1 else str(run[0]) for run in runs)})"


def _run(run: Sequence[int]) -> str:
    return f"range({run[-1] + 1})" if not run[0] else f"range({run[0]}, {run[-1] + 1})"


def state_dict_script_lines(edit: Slice, step: StateDictStep, state: State) -> list[str]:
    model = step.before
    return [
        line
        for path in sliced_paths(edit, model.blueprint)
        for line in _state_dict_script_lines(edit, path, model, state)
    ]


def _state_dict_script_lines(edit: Slice, path: str, model: StateDictModel, state: State) -> list[str]:
    there, prefix = numbered_children(model, path)
    kept = positions(edit, 1 + max(there), path)
    if model.own_entries[path]:
        raise InexpressibleError(f"{path or 'the model'} has tensors of its own beside its numbered children")
    start = joined(path, prefix)
    below = [name for name in state.names if name.startswith(start)]
    state.names = [name for name in state.names if not name.startswith(start)]
    for place, number in enumerate(kept):
        old = f"{start}{number}."
        state.names += [f"{start}{place}." + name.removeprefix(old) for name in below if name.startswith(old)]
    value = (
        "value" if edit.tied or len(set(kept)) == len(kept) else "value.clone() if number in kept[:place] else value"
    )
    of_old, of_new = (
        f'{quoted(start)} + str({name}) + "."' if start else f'str({name}) + "."' for name in ("number", "place")
    )
    return [
        f"kept = {_numbers(kept)}",
        f"below = {{key: state.pop(key) for key in list(state) if key.startswith({quoted(start)})}}",
        "for place, number in enumerate(kept):",
        f"    old, at = {of_old}, {of_new}",
        f"    state |= {{at + key.removeprefix(old): {value} for key, value in below.items() if key.startswith(old)}}",
    ]
