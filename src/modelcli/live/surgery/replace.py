"""replace: replace every match with a new module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.picking import Part, parts_below
from modelcli.edits.replace import Replace, partings, replaced_paths, resolved_lines
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.new_modules import constructor_call, new_statements, seed_statements, tensor_names
from modelcli.live.script.source_text import STATEMENTS, InexpressibleError, SourceText, dedented, loop
from modelcli.live.script.source_text import quoted as literal
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.sources import named_tensors
from modelcli.live.surgery import input_channels, layouts, left_out, shapes
from modelcli.live.surgery.core import blueprint_of, brief, count, paths_of_modules, submodule
from modelcli.live.surgery.holes import resolved_calls, resolved_for_keys
from modelcli.live.surgery.kept_weights import KeptFrom, KeptPart, keep_weights, of_module
from modelcli.live.surgery.new_modules import maker, new_for_keys
from modelcli.live.surgery.state_dicts import meta_tensors, new_module
from modelcli.live.surgery.storages import shown_by
from modelcli.model.dtypes import is_differentiable
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
    parted = partings([(target.paths, target.everywhere) for target in targets], tied(shown_by(module)))
    if parted and not edit.untie:
        raise RequestError(parted[0].message, parted[0].hint)
    olds = [(target.module, target.paths[0]) for target in targets]
    calls = resolved_calls(module, edit.module, olds, context)
    news = maker(module, calls, context, olds)()
    notes = [tie.note for tie in parted]
    replaced = [(*pair, new) for pair, new in zip(olds, news, strict=True)]
    notes += left_out.notes(edit.module, calls, replaced)
    notes += _trains_now([(path, _flags(old), new) for old, path, new in replaced])
    kept: Mapping[str, Mapping[str, KeptPart]] = {}
    if edit.keep_weights:
        kept, told = keep_weights([of_module(old, path, new) for old, path, new in replaced], edit.keep_weights)
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
    return Applied(module, [replace(changes[0], resolved=tuple(lines)), *changes[1:]], notes, context.inputs)


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
    parted = partings([(target.paths, target.everywhere) for target in targets], tied(model.shown))
    if parted and not edit.untie:
        raise RequestError(parted[0].message, parted[0].hint)
    olds = [target.old(model) for target in targets]
    calls = resolved_for_keys(edit.module, [(old.told, old.path) for old in olds], context)
    news = new_for_keys(model, calls, context, [(old.mode, old.path) for old in olds])
    notes = [tie.note for tie in parted]
    known = [(old.told, old.path, new, call) for old, new, call in zip(olds, news, calls, strict=True)]
    classes = [(old, path, new) for old, path, new, _ in known if isinstance(old, nn.Module)]
    made_of = [call for old, _, _, call in known if isinstance(old, nn.Module)]
    notes += left_out.notes(edit.module, made_of, classes)
    notes += shapes.notes(
        [(old, path, new) for old, path, new, _ in known if not isinstance(old, nn.Module)],
        [call for old, _, _, call in known if not isinstance(old, nn.Module)],
    )
    notes += _trains_now([(old.path, old.flags, new) for old, new in zip(olds, news, strict=True)])
    briefs = parts_below(model, [path for target in targets for path in target.paths])
    kept: Mapping[str, Mapping[str, KeptPart]] = {}
    if edit.keep_weights:
        givens = [old.kept(model, briefs, new) for old, new in zip(olds, news, strict=True)]
        kept, told = keep_weights(givens, edit.keep_weights)
        notes += told
    keeps = {path for path, parts in kept.items() if parts}
    lines = resolved_lines(edit, [(target.paths, call) for target, call in zip(targets, calls, strict=True)], keeps)
    changes, placed, number = [], dict[str, NewModule](), model.next_identity
    for target, new in zip(targets, news, strict=True):
        made = new_module(new, number)
        number += made.identities
        for path in target.paths:
            placed[path] = made
            part = briefs[path]
            changes.append(Change(path, edit.name, part.brief, made.brief, part.params, made.params))
    changes[0] = replace(changes[0], resolved=tuple(lines))
    return Applied(model.with_modules(placed), changes, notes, context.inputs)


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

        def carrying(name: str) -> layouts.CopyRule | None:
            if isinstance(self.told, nn.Module):
                return layouts.copy_rule(name, self.told, new)
            return layouts.copy_rule_by_shapes(name, tensors[name], new)

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


# --- scripts ---------------------------------------------------------------------------------------------------------


KEEP_WEIGHTS = dedented('''
    def keep_weights(old, new, swapped=()):
        """Copy the overlapping part of each tensor of the same name out of a state dict, and give `new` back.

        The axes of those in `swapped` are the other way round in the old module.
        """
        for name, tensor in new.state_dict().items():
            if name in old and tensor.dim() == old[name].dim():
                values = old[name].t() if name in swapped else old[name]
                part = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, values.shape))
                tensor[part] = values[part]
        return new
''')


def script_lines(edit: Replace, step: Step) -> list[str]:
    return script_lines_together([edit], step)


def script_lines_together(edits: Sequence[Replace], step: Step) -> list[str]:
    """Write the replacements that one edit resolved to. None of the modules is inside another one."""
    script, before, after = step.script, step.before, step.after
    blueprint = describe(before)
    news: dict[int, tuple[Replace, list[str]]] = {}
    for edit in edits:
        for path in selectors.select_modules(blueprint, edit.targets, without=edit.without):
            news.setdefault(id(after.get_submodule(path)), (edit, []))[1].append(path)
    lines = seed_statements(step.seed, [after.get_submodule(paths[0]) for _, paths in news.values()])
    made = [
        (constructor_call(script, edit.module, after.get_submodule(paths[0])), edit, paths)
        for edit, paths in news.values()
    ]
    # All draw from one generator, so their order is kept; runs of equal ones become loops.
    while made:
        text, edit, paths = made[0]
        alike = 0
        while alike < len(made) and made[alike][0] == text and len(made[alike][2]) == 1:
            alike += 1
        names = [paths[0] for _, _, paths in made[:alike]]
        carried = [_carried(edit, before.get_submodule(path), after.get_submodule(path)) for path in names]
        if (
            alike > STATEMENTS
            and all(access_paths.is_plain_assignment(before, path) for path in names)
            and len(set(carried)) == 1
        ):
            new = carried[0].written(script, "model.get_submodule(name)", text)
            lines += loop("name", names, f"model.set_submodule(name, {new})")
            made = made[alike:]
            continue
        how = _carried(edit, before.get_submodule(paths[0]), after.get_submodule(paths[0]))
        new = how.written(script, access_paths.module_expression(before, paths[0]), text)
        lines.append(access_paths.replace_statement(before, paths[0], new))
        lines += [
            access_paths.replace_statement(before, path, access_paths.module_expression(after, paths[0]))
            for path in paths[1:]
        ]
        made = made[1:]
    return lines


@dataclass(frozen=True)
class _Carried:
    """How a script carries weights over: `swapped` axes, and for `how` the tensors that get other input channels."""

    how: str | None
    swapped: tuple[str, ...] = ()
    channels: tuple[tuple[str, int], ...] = ()

    def written(self, script: SourceText, old: str, new: str) -> str:
        """The expression for a new module with the weights of an old one, and the functions that it calls."""
        if self.how is None:
            return new
        script.helpers.setdefault(KEEP_WEIGHTS)
        more = f", swapped={self.swapped!r}" if self.swapped else ""
        return f"keep_weights({self.adapted(script, f'{old}.state_dict()')}, {new}{more})"

    def adapted(self, script: SourceText, state: str) -> str:
        """The expression for an old state dict whose convolutions take the new input channels."""
        if not self.channels or self.how is None:
            return state
        script.helpers.setdefault(input_channels.HELPERS[self.how])
        return f"{self.how}_channels({state}, {dict(self.channels)!r})"


def _carried(edit: Replace, old: nn.Module, new: nn.Module) -> _Carried:
    if edit.keep_weights is None:
        return _Carried(None)
    channels = _channels(edit.keep_weights, named_tensors(old), new)
    return _Carried(edit.keep_weights, layouts.transposed(old, new), channels)


def _channels(how: str, old: Mapping[str, Tensor], new: nn.Module) -> tuple[tuple[str, int], ...]:
    """The tensors of a new module that get other input channels than the old ones have, with their number."""
    rules = {name: input_channels.rule_for(name, old[name], new, how) for name in named_tensors(new) if name in old}
    return tuple((name, rule.channels) for name, rule in rules.items() if rule is not None)


def state_dict_script_lines(edit: Replace, step: StateDictStep, state: State) -> list[str]:
    """Write the new tensors at the position of the first old one."""
    script, names = step.script, list(step.before.keys)
    paths = selectors.select_modules(step.before.blueprint, edit.targets, without=edit.without)
    if len({id(step.new(path)) for path in paths}) != 1:
        raise InexpressibleError("one module would have to be several")
    lines = new_statements(script, edit.module, step.new(paths[0]), step.seed)
    for path in paths:
        prefix = f"{path}."
        if edit.keep_weights:
            below = f"key.removeprefix({literal(prefix)}): value for key, value in state.items()"
            old = f"{{{below} if key.startswith({literal(prefix)})}}"
            dense = [name for name in names if name.startswith(prefix) and name in step.before.tensors]
            tensors = {name.removeprefix(prefix): each for name, each in meta_tensors(step.before, dense).items()}
            carried = _Carried(edit.keep_weights, (), _channels(edit.keep_weights, tensors, step.new(path)))
            script.helpers.setdefault(KEEP_WEIGHTS)
            lines.append(f"keep_weights({carried.adapted(script, old)}, new)")
        lines += state.put_new_module(
            prefix, tensor_names(step.new(path)), [name for name in names if name.startswith(prefix)]
        )
    return lines
