"""replace: replace every match with a new module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.picking import Part, parts_below
from modelcli.edits.replace import Replace, partings, replaced_paths, resolved_lines, settled_partings
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.expressions import Call
from modelcli.language.quoting import quoted
from modelcli.live.surgery import layouts, left_out, shapes
from modelcli.live.surgery.core import blueprint_of, brief, count, paths_of_modules, submodule
from modelcli.live.surgery.holes import resolved_calls, resolved_for_keys
from modelcli.live.surgery.kept_weights import KeptFrom, KeptPart, keep_weights, of_module
from modelcli.live.surgery.new_modules import maker, new_for_keys
from modelcli.live.surgery.replace.scripts import (
    script_lines,
    script_lines_together,
    state_dict_script_lines,
)
from modelcli.live.surgery.replace.tied_modules import (
    TiedKeys,
    TiedModule,
    donor_call,
    in_order,
    tied_keys,
    tied_modules,
    with_tied_keys,
)
from modelcli.live.surgery.state_dicts import meta_tensors, new_module
from modelcli.live.surgery.storages import shown_by
from modelcli.model.dtypes import is_differentiable
from modelcli.model.paths import joined
from modelcli.model.shared_bytes import tied
from modelcli.model.state_dict import NewModule, StateDictModel
from modelcli.model.tensors import Shape
from modelcli.wording import listed


@dataclass(frozen=True)
class Target:
    """A module that an edit picks: the paths at which it is picked, and all its paths."""

    module: nn.Module
    paths: tuple[str, ...]
    everywhere: tuple[str, ...]


def carry_out(module: nn.Module, edit: Replace, context: Context) -> Applied[nn.Module]:
    blueprint = blueprint_of(module, context)
    paths = replaced_paths(edit, blueprint)
    targets = targets_of(module, paths)
    paths_of, groups = [target.paths for target in targets], tied(shown_by(module))
    parted = partings([(target.paths, target.everywhere) for target in targets], groups)
    olds = [(target.module, target.paths[0]) for target in targets]

    def followers() -> list[TiedModule]:
        shown = maker(module, resolved_calls(module, edit.module, olds, context), context, olds, on_meta_alone=True)()
        return tied_modules(module, paths_of, groups, shown)

    notes = settled_partings(edit, parted, partial(_is_possible, followers))
    calls = resolved_calls(module, edit.module, olds, context)
    tied_to = followers() if edit.tie else []
    order = in_order(len(targets), tied_to)
    made = maker(
        module,
        [calls[index] if each is None else donor_call(each.shape) for index, each in order],
        context,
        [olds[index] if each is None else (each.module, each.paths[0]) for index, each in order],
    )()
    news = [new for (_, each), new in zip(order, made, strict=True) if each is None]
    donors = {id(each.module): _bias_alone(new) for (_, each), new in zip(order, made, strict=True) if each is not None}
    replaced = [(*pair, new) for pair, new in zip(olds, news, strict=True)]
    notes += left_out.notes(edit.module, calls, replaced)
    notes += _trains_now([(path, _flags(old), new) for old, path, new in replaced])
    kept: Mapping[str, Mapping[str, KeptPart]] = {}
    if edit.keep_weights:
        givens = [of_module(old, path, new) for old, path, new in replaced]
        givens += [each.kept(donors[id(each.module)]) for each in tied_to if each.bias is not None]
        kept, told = keep_weights(givens, edit.keep_weights)
        notes += told
    keeps = {path for path, parts in kept.items() if parts}
    lines = resolved_lines(edit, [(target.paths, call) for target, call in zip(targets, calls, strict=True)], keeps)
    changes = []
    for target, new in zip(targets, news, strict=True):
        old = target.module
        for path in target.paths:
            parent, _, name = path.rpartition(".")
            submodule(module, parent)._modules[name] = new
            changes.append(Change(path, edit.name, brief(old), brief(new), count(old), count(new)))
    for each in tied_to:
        changes += each.take(news[each.tied.index], donors.get(id(each.module)), edit.name)
        notes.append(_still_tied(each.tied.name, targets[each.tied.index].paths[0], each.tied.own))
    return Applied(module, [replace(changes[0], resolved=tuple(lines)), *changes[1:]], notes, context.inputs)


def _is_possible(followers: Callable[[], object]) -> bool:
    """Whether other modules can follow a replaced one in size."""
    try:
        followers()
    except RequestError:
        return False
    return True


def _bias_alone(donor: nn.Module) -> nn.Module:
    """Return a layer without its weight: only its bias is taken."""
    donor._parameters.pop("weight")
    return donor


def _still_tied(name: str, target: str, own: str) -> str:
    return f"{name} is {joined(target, own)}, as before"


def targets_of(module: nn.Module, paths: Sequence[str]) -> list[Target]:
    """Return the distinct modules at these paths, in order."""
    everywhere = paths_of_modules(module)
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path in paths:
        old = submodule(module, path)
        found.setdefault(id(old), (old, []))[1].append(path)
    return [Target(old, tuple(named), tuple(everywhere[key])) for key, (old, named) in found.items()]


# --- flags -----------------------------------------------------------------------------------------------------------


def _flags(module: nn.Module) -> dict[str, bool]:
    """Return `requires_grad` of each parameter that can be trained."""
    return {name: p.requires_grad for name, p in module.named_parameters() if _is_differentiable(p)}


def _trains_now(replaced: Iterable[tuple[str, Mapping[str, bool], nn.Module]]) -> list[str]:
    """Return a note on modules that were frozen, at least partly, and whose replacements are trainable.

    `replaced` are the paths, the flags of the old parameters that can be trained, and the new modules.
    """
    paths: list[str] = []
    parts: list[str] = []
    for path, flags, new in replaced:
        trained = {name for name, parameter in new.named_parameters() if parameter.requires_grad}
        if flags and not any(flags.values()) and trained:
            paths.append(path)
        else:
            parts += [f"{path}.{name}" for name, flag in flags.items() if not flag and name in trained]
    told = []
    for names in (paths, parts):
        if len(names) == 1:
            kept = quoted(selectors.literal(names[0]))
            told.append(f"{names[0]} was frozen, what is new trains: freeze {kept} keeps it so")
        elif names:
            told.append(f"{listed(names, 3)} were frozen, what is new trains: freeze keeps them so")
    return told


def _is_differentiable(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


# --- state-dict models -----------------------------------------------------------------------------------------------


def apply_to_state_dict(edit: Replace, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
    """Return the model with the selected modules replaced. New values are drawn when they are written."""
    blueprint = model.blueprint
    targets = _targets_of_keys(model, replaced_paths(edit, blueprint))
    paths_of, groups = [target.paths for target in targets], tied(model.shown)
    parted = partings([(target.paths, target.everywhere) for target in targets], groups)
    olds = [target.old(model) for target in targets]

    def made_of(calls: Sequence[Call], modes: Sequence[tuple[bool, str]]) -> list[nn.Module]:
        return new_for_keys(model, calls, context, modes)

    def resolved() -> list[Call]:
        return resolved_for_keys(edit.module, [(old.told, old.path) for old in olds], context)

    def followers() -> list[TiedKeys]:
        return tied_keys(model, paths_of, groups, made_of(resolved(), [(old.mode, old.path) for old in olds]))

    notes = settled_partings(edit, parted, partial(_is_possible, followers))
    calls = resolved()
    tied_to = followers() if edit.tie else []
    order = in_order(len(targets), tied_to)
    made = made_of(
        [calls[index] if each is None else donor_call(each.shape) for index, each in order],
        [(olds[index].mode, olds[index].path) if each is None else (True, each.path) for index, each in order],
    )
    news = [new for (_, each), new in zip(order, made, strict=True) if each is None]
    donors = {each.path: _bias_alone(new) for (_, each), new in zip(order, made, strict=True) if each is not None}
    known = [(old.told, old.path, new, call) for old, new, call in zip(olds, news, calls, strict=True)]
    classes = [(old, path, new) for old, path, new, _ in known if isinstance(old, nn.Module)]
    calls_of_classes = [call for old, _, _, call in known if isinstance(old, nn.Module)]
    notes += left_out.notes(edit.module, calls_of_classes, classes)
    notes += shapes.notes(
        [(old, path, new) for old, path, new, _ in known if not isinstance(old, nn.Module)],
        [call for old, _, _, call in known if not isinstance(old, nn.Module)],
    )
    notes += _trains_now([(old.path, old.flags, new) for old, new in zip(olds, news, strict=True)])
    briefs = parts_below(model, [path for target in targets for path in target.paths] + [each.path for each in tied_to])
    kept: Mapping[str, Mapping[str, KeptPart]] = {}
    if edit.keep_weights:
        givens = [old.kept(model, briefs, new) for old, new in zip(olds, news, strict=True)]
        givens += [each.kept(model, donors[each.path], briefs[each.path].brief) for each in tied_to if each.bias]
        kept, told = keep_weights(givens, edit.keep_weights)
        notes += told
    keeps = {path for path, parts in kept.items() if parts}
    lines = resolved_lines(edit, [(target.paths, call) for target, call in zip(targets, calls, strict=True)], keeps)
    changes, placed, number = [], dict[str, NewModule](), model.next_identity
    for target, new in zip(targets, news, strict=True):
        entry = new_module(new, number)
        number += entry.identities
        for path in target.paths:
            placed[path] = entry
            part = briefs[path]
            changes.append(Change(path, edit.name, part.brief, entry.brief, part.params, entry.params))
    changed = model.with_modules(placed)
    if tied_to:
        changed = with_tied_keys(changed, tied_to, paths_of, donors, number)
        after = parts_below(changed, [each.path for each in tied_to])
        for each in tied_to:
            part, now = briefs[each.path], after[each.path]
            changes.append(Change(each.path, edit.name, part.brief, now.brief, part.params, now.params))
            notes.append(_still_tied(each.tied.name, paths_of[each.tied.index][0], each.tied.own))
    changes[0] = replace(changes[0], resolved=tuple(lines))
    return Applied(changed, changes, notes, context.inputs)


@dataclass(frozen=True)
class _KeysTarget:
    """A module of a state-dict model to replace: the paths at which it is replaced, and all its paths."""

    paths: tuple[str, ...]
    everywhere: tuple[str, ...]

    def old(self, model: StateDictModel) -> _OldKeys:
        """The old module, in short."""
        path = self.paths[0]
        prefix = f"{path}."
        names = {name.removeprefix(prefix): name for name in model.names_below(path)}
        made = model.modules[path].made
        mode = made.training if made is not None else True
        tensors = {own: model.tensors[name] for own, name in names.items() if name in model.tensors}
        if made is None:
            shapes: Mapping[str, Shape] = {
                own: tensor.shape or () for own, tensor in tensors.items() if tensor.kind == "parameter"
            }
        told = shapes if made is None else made
        flags: dict[str, bool] = {}
        for identity, own in {tensor.identity: own for own, tensor in reversed(tensors.items())}.items():
            tensor = tensors[own]
            assert tensor.identity == identity
            if tensor.kind == "parameter" and is_differentiable(tensor.dtype):
                flags[own] = tensor.requires_grad is not False
        flags = {own: flags[own] for own in tensors if own in flags}
        return _OldKeys(path, told, mode, flags, names)


@dataclass(frozen=True)
class _OldKeys:
    """An old module: one that an edit has added, or the shapes of its parameters, and its mode.

    `flags` are `requires_grad` of each parameter that can be trained; `names` are its keys, by their names in it.
    """

    path: str
    told: nn.Module | Mapping[str, Shape]
    mode: bool
    flags: Mapping[str, bool]
    names: Mapping[str, str]

    def kept(self, model: StateDictModel, briefs: Mapping[str, Part], new: nn.Module) -> KeptFrom:
        dense = {own: name for own, name in self.names.items() if name in model.tensors}
        views = meta_tensors(model, list(dense.values()))
        tensors = {own: views[name] for own, name in dense.items()}

        def carrying(name: str, resampled: bool) -> layouts.CopyRule | None:
            if isinstance(self.told, nn.Module):
                return layouts.copy_rule(name, self.told, new, resampled=resampled)
            return layouts.copy_rule_by_shapes(name, tensors[name], new, resampled=resampled)

        return KeptFrom(tensors, briefs[self.path].brief, self.path, new, carrying)


def _targets_of_keys(model: StateDictModel, paths: Sequence[str]) -> list[_KeysTarget]:
    """Return the distinct modules at these paths, in order; modules that an edit has added may be shared."""
    everywhere: dict[int, list[str]] = {}
    for path, module in model.modules.items():
        if module.made is not None:
            everywhere.setdefault(id(module.made), []).append(path)
    found: dict[object, list[str]] = {}
    for path in paths:
        made = model.modules[path].made
        found.setdefault(path if made is None else id(made), []).append(path)
    return [
        _KeysTarget(tuple(named), tuple(everywhere[key]) if isinstance(key, int) else tuple(named))
        for key, named in found.items()
    ]


__all__ = [
    "Target",
    "apply_to_state_dict",
    "carry_out",
    "script_lines",
    "script_lines_together",
    "state_dict_script_lines",
    "targets_of",
]
