"""freeze, unfreeze: `requires_grad`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.freeze import Freeze
from modelcli.edits.unfreeze import Unfreeze
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live.describe import describe
from modelcli.live.script.flags import flags
from modelcli.live.script.state import State
from modelcli.live.script.step import Step
from modelcli.live.sources import flag_of, is_lazy, set_flag
from modelcli.live.surgery.core import names_of_one, tie_notes
from modelcli.live.surgery.picking import groups_of
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import ancestors, parent_of, shown
from modelcli.wording import counted, listed


def carry_out(module: nn.Module, edit: Freeze | Unfreeze, context: Context) -> Applied[nn.Module]:
    trained = edit.trains
    blueprint = describe(module)
    for target in edit.targets:
        sizes = [blueprint.params_of(path) for path in selectors.matched_modules(selectors.parse(target), blueprint)]
        if sizes and not any(sizes) and not any(map(is_lazy, module.parameters())):
            raise RequestError(
                f"nothing to {edit.name}: {target} has no parameters", "modelcli params shows where they are"
            )
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    possible = [name for name in parameters if blueprint.by_name[name].is_differentiable]
    chosen = set(names).intersection(possible)
    if not chosen:
        whole_numbers = next((blueprint.by_name[name] for name in names if name in parameters), None)
        why = "" if whole_numbers is None else f" that can be trained: {whole_numbers.name} is {whole_numbers.dtype}"
        raise RequestError(
            f"nothing to {edit.name}: {', '.join(edit.targets)} has no parameters{why}",
            "modelcli params shows where they are",
        )
    tensors = {id(parameters[name]): parameters[name] for name in chosen}
    changes, done = [], "trainable" if trained else "frozen"
    groups = groups_of(edit.targets, blueprint, chosen)
    selectors.require_expected(edit.expect, [path for path, _ in groups])
    there = _count_at(possible)
    for path, below in groups:
        own = {id(parameters[name]): parameters[name] for name in below}
        before = _flags([flag_of(p) for p in own.values()])
        size = sum(p.numel() for p in own.values() if not is_lazy(p))
        if edit.without and len(below) < there[path]:
            left = f" except {', '.join(edit.without)}"
            before, after = f"{before}{left}" if before == done else before, f"{done}{left}"
        else:
            after = done
        changes.append(Change(path, edit.name, before, after, size, size))
    same = all(flag_of(tensor) is trained for tensor in tensors.values())
    for tensor in tensors.values():
        set_flag(tensor, trained)
    notes = [_nothing_new(changes, edit)] if same else []
    notes += tie_notes(names_of_one(blueprint), chosen, done)
    notes += _left_note(blueprint, names, chosen, trained)
    if not trained:
        notes += _statistics_note(blueprint, names)
    if not same:
        changes[0] = replace(changes[0], resolved=(_resolved_line(edit, blueprint, groups, there),))
    return Applied(module, changes, notes, context.inputs)


def _nothing_new(changes: Sequence[Change], edit: Freeze | Unfreeze) -> str:
    """That an edit changes nothing: it may be one too many."""
    paths = [shown(change.path) for change in changes]
    be = "is" if len(paths) == 1 else "are"
    return f"{edit.name} changes nothing: {listed(paths, 3)} {be} {changes[0].after} already"


def _statistics_note(blueprint: Blueprint, names: Collection[str]) -> list[str]:
    """What `requires_grad` leaves as it is: layers with running statistics update them in train mode.

    `names` are the tensors that were picked: of such a layer one is enough.
    """
    picked = {parent_of(name) for name in names}
    statistics = {
        parent_of(tensor.name): None
        for tensor in blueprint.tensors
        if tensor.name.rpartition(".")[2] == "running_mean" and tensor.tied_to is None
    }
    layers = [path for path in statistics if path in picked]
    if not layers:
        return []
    one = len(layers) == 1
    update = f"{counted(len(layers), 'normalisation layer')} ({listed([*map(shown, layers)], 3)})"
    update += f" still {'updates its' if one else 'update their'} running mean and variance in train mode"
    return [f"frozen or not, {update}: call .eval() on {'it' if one else 'them'} after model.train()"]


def _resolved_line(
    edit: Freeze | Unfreeze, blueprint: Blueprint, groups: Sequence[tuple[str, list[str]]], there: Mapping[str, int]
) -> str:
    """The edit without patterns: as it was given where it has none, since `--except fc` says many names in one."""
    paths = (*(module.path for module in blueprint.modules), *(tensor.name for tensor in blueprint.tensors))
    if {*edit.targets, *edit.without} <= set(map(selectors.literal, paths)):
        return str(replace(edit, expect=None))
    return str(type(edit)(targets=tuple(_resolved_targets(groups, there))))


def _resolved_targets(groups: Sequence[tuple[str, list[str]]], there: Mapping[str, int]) -> list[str]:
    """Literal paths: a module where all its parameters were chosen, else the tensors one by one."""
    found: list[str] = []
    for path, below in groups:
        whole = len(below) == there[path]
        found += [selectors.literal(path)] if whole else map(selectors.literal, below)
    return found


def _count_at(names: Iterable[str]) -> Mapping[str, int]:
    """How many of these tensors each path names: the tensor itself, and the modules above it."""
    return Counter(path for name in names for path in ancestors(name))


def _left_note(blueprint: Blueprint, names: Sequence[str], chosen: Collection[str], trained: bool) -> list[str]:
    """The parameters that were picked and whose flag stays: whole numbers, and what is no dense tensor."""
    left = [info for name in names if name not in chosen and (info := blueprint.by_name[name]).kind == "parameter"]
    left = [info for info in left if info.requires_grad is (not trained)]
    if not left:
        return []
    first, more = left[0], f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    why = "it is no dense tensor" if first.is_differentiable else f"{first.dtype} cannot be trained"
    return [f"{first.name}{more} stays {'frozen' if trained else 'trainable'}: {why}"]


def _flags(flags: Sequence[bool | None]) -> str:
    if True in flags and False in flags:
        return "partly frozen"
    if None in flags:
        return "not known"
    return "trainable" if all(flags) else "frozen"


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Freeze | Unfreeze, step: Step) -> list[str]:
    return flags(step.before, describe(step.before), describe(step.after))


def state_dict_script_lines(edit: Freeze | Unfreeze, step: Step, state: State) -> list[str]:
    return ["# a state dict holds no requires_grad: nothing to do"]
