"""What freeze and unfreeze have in common: they set `requires_grad`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.picking import count_at, groups_of, names_of_one, tie_notes
from modelcli.edits.targets import OfTargets
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint
from modelcli.model.dtypes import is_differentiable
from modelcli.model.paths import lies_in, parent_of, shown
from modelcli.model.state_dict import StateDictModel
from modelcli.wording import counted, listed


@dataclass(frozen=True, kw_only=True)
class Flags(OfTargets):
    """An edit of `requires_grad`."""

    #: The new value of `requires_grad`.
    trains: ClassVar[bool]

    handler: ClassVar[str] = "modelcli.live.surgery.freeze"
    can_break_fit: ClassVar[bool] = False
    changes_flags_only: ClassVar[bool] = True

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        parameters = {name: None for name, tensor in model.tensors.items() if tensor.kind == "parameter"}
        found = flagging(self, model.blueprint, parameters.keys())
        changed = model.with_tensors(lambda tensor: tensor.trained(self.trains), found.names)
        return Applied(changed, [*found.changes], [*found.notes], context.inputs)


@dataclass(frozen=True)
class Flagging:
    """The parameters whose `requires_grad` changes, and notes."""

    names: frozenset[str]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def flagging(edit: Flags, blueprint: Blueprint, parameters: Collection[str]) -> Flagging:
    """Find the parameters to change. `parameters` are the names of those that can be trained.

    Raises RequestError if the selectors pick no parameter that can be trained.
    """
    trained = edit.trains
    is_lazy = any(tensor.shape is None and tensor.kind == "parameter" for tensor in blueprint.tensors)
    for target in edit.targets:
        modules = selectors.matched_modules(selectors.parse(target), blueprint)
        if modules and not is_lazy and not _have_parameters(modules, blueprint):
            raise RequestError(
                f"nothing to {edit.name}: {target} has no parameters", "modelcli params lists the parameters"
            )
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    known = blueprint.by_name
    dtypes = {tensor.dtype for tensor in blueprint.tensors}
    differentiable = set(filter(is_differentiable, dtypes))
    possible = [name for name in parameters if known[name].dtype in differentiable]
    chosen = frozenset(names).intersection(possible)
    if not chosen:
        whole_numbers = next((known[name] for name in names if name in parameters), None)
        why = "" if whole_numbers is None else f" that can be trained: {whole_numbers.name} is {whole_numbers.dtype}"
        raise RequestError(
            f"nothing to {edit.name}: {', '.join(edit.targets)} has no parameters{why}",
            "modelcli params lists the parameters",
        )
    changes, done = [], "trainable" if trained else "frozen"
    groups = groups_of(edit.targets, blueprint, chosen)
    selectors.require_expected(edit.expect, [path for path, _ in groups])
    there = count_at(possible) if edit.without else {}
    for path, below in groups:
        own = {known[name].identity: known[name] for name in below}
        before = _flags([tensor.requires_grad for tensor in own.values()])
        size = sum(tensor.elements for tensor in own.values())
        if edit.without and len(below) < there[path]:
            left = f" except {', '.join(edit.without)}"
            before, after = f"{before}{left}" if before == done else before, f"{done}{left}"
        else:
            after = done
        changes.append(Change(path, edit.name, before, after, size, size))
    same = all(known[name].requires_grad is trained for name in chosen)
    notes = [_nothing_new(changes, edit)] if same else []
    notes += tie_notes(names_of_one(blueprint), chosen, done)
    notes += _left_note(blueprint, names, chosen, trained)
    if not trained:
        notes += _statistics_note(blueprint, names)
    if not same:
        changes[0] = replace(changes[0], resolved=(_resolved_line(edit, blueprint, groups, possible),))
    return Flagging(chosen, tuple(changes), tuple(notes))


def _have_parameters(modules: Collection[str], blueprint: Blueprint) -> bool:
    """Whether a parameter with elements lies at or below any of these modules."""
    return any(
        tensor.kind == "parameter" and tensor.elements and lies_in(parent_of(tensor.name), modules)
        for tensor in blueprint.tensors
    )


def _nothing_new(changes: Sequence[Change], edit: Flags) -> str:
    paths = [shown(change.path) for change in changes]
    be = "is" if len(paths) == 1 else "are"
    return f"{edit.name} changes nothing: {listed(paths, 3)} {be} {changes[0].after} already"


def _statistics_note(blueprint: Blueprint, names: Collection[str]) -> list[str]:
    statistics = {
        parent_of(tensor.name): None
        for tensor in blueprint.tensors
        if tensor.name.endswith("running_mean")
        and tensor.name.rpartition(".")[2] == "running_mean"
        and tensor.tied_to is None
    }
    if not statistics:
        return []
    picked = set(map(parent_of, names))
    layers = [path for path in statistics if path in picked]
    if not layers:
        return []
    one = len(layers) == 1
    update = f"{counted(len(layers), 'normalisation layer')} ({listed([*map(shown, layers)], 3)})"
    update += f" still {'updates its' if one else 'update their'} running mean and variance in train mode"
    return [f"frozen or not, {update}: call .eval() on {'it' if one else 'them'} after model.train()"]


def _resolved_line(
    edit: Flags, blueprint: Blueprint, groups: Sequence[tuple[str, list[str]]], possible: Iterable[str]
) -> str:
    if all(_is_literal(text, blueprint) for text in (*edit.targets, *edit.without)):
        return str(replace(edit, expect=None))
    return str(type(edit)(targets=tuple(_resolved_targets(groups, count_at(possible)))))


def _is_literal(text: str, blueprint: Blueprint) -> bool:
    """Whether a selector is the literal path of one module or tensor."""
    parsed = selectors.parse(text)
    names = [selectors.plain(component) for component in parsed.components]
    if parsed.type is not None or None in names:
        return False
    path = ".".join(name for name in names if name is not None)
    return (path in blueprint.by_path or path in blueprint.by_name) and selectors.literal(path) == text


def _resolved_targets(groups: Sequence[tuple[str, list[str]]], there: Mapping[str, int]) -> list[str]:
    found: list[str] = []
    for path, below in groups:
        whole = len(below) == there[path]
        found += [selectors.literal(path)] if whole else map(selectors.literal, below)
    return found


def _left_note(blueprint: Blueprint, names: Sequence[str], chosen: Collection[str], trained: bool) -> list[str]:
    left = [info for name in names if name not in chosen and (info := blueprint.by_name[name]).kind == "parameter"]
    left = [info for info in left if info.requires_grad is (not trained)]
    if not left:
        return []
    first, more = left[0], f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    why = "it is not a dense tensor" if first.is_differentiable else f"{first.dtype} cannot be trained"
    return [f"{first.name}{more} stays {'frozen' if trained else 'trainable'}: {why}"]


def _flags(flags: Sequence[bool | None]) -> str:
    if True in flags and False in flags:
        return "partly frozen"
    if None in flags:
        return "not known"
    return "trainable" if all(flags) else "frozen"
