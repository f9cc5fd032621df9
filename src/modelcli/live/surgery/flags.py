"""freeze, unfreeze: `requires_grad`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from modelcli import selectors
from modelcli.blueprints import Blueprint, ancestors, parent_of, shown
from modelcli.edits import Freeze, Unfreeze
from modelcli.errors import RequestError
from modelcli.live.describe import describe
from modelcli.live.sources import is_lazy
from modelcli.live.surgery.core import Change, Context, Done, tie_notes


def carry_out(module: nn.Module, edit: Freeze | Unfreeze, context: Context) -> Done:
    trained = isinstance(edit, Unfreeze)
    blueprint = describe(module)
    for target in edit.targets:
        sizes = [blueprint.params_of(path) for path in selectors.matched_modules(selectors.parse(target), blueprint)]
        if sizes and not any(sizes) and not any(map(is_lazy, module.parameters())):
            raise RequestError(
                f"nothing to {edit.name}: {target} has no parameters", "modelcli params shows where they are"
            )
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    chosen = {name for name in names if name in parameters}
    if not chosen:
        raise RequestError(
            f"nothing to {edit.name}: {', '.join(edit.targets)} has no parameters",
            "modelcli params shows where they are",
        )
    tensors = {id(parameters[name]): parameters[name] for name in chosen}
    if trained:
        for name in chosen:
            if not (parameters[name].is_floating_point() or parameters[name].is_complex()):
                raise RequestError(f"{name} is {parameters[name].dtype}: only floating-point tensors can be trained")
    changes = []
    groups = groups_of(edit.targets, blueprint, chosen)
    require_expected(edit.expect, groups)
    there = parameters_at(blueprint)
    for path, below in groups:
        own = {id(parameters[name]): parameters[name] for name in below}
        before = _flags([p.requires_grad for p in own.values()])
        size = sum(p.numel() for p in own.values() if not is_lazy(p))
        after = "trainable" if trained else "frozen"
        if edit.without and len(below) < there[path]:
            after += f" except {', '.join(edit.without)}"
        changes.append(Change(path, edit.name, before, after, size, size))
    for tensor in tensors.values():
        tensor.requires_grad = trained  # the method is not for parameters without a shape
    line = str(type(edit)(targets=tuple(_resolved_targets(blueprint, edit, chosen))))
    notes = tie_notes(blueprint, chosen, "trainable" if trained else "frozen")
    if not trained:
        notes += _statistics_note(blueprint, names)
    return Done(module, [replace(changes[0], resolved=(line,)), *changes[1:]], notes, context.inputs)


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
    listed = ", ".join(map(shown, layers[:3])) + (", ..." if len(layers) > 3 else "")
    one = len(layers) == 1
    update = "1 normalisation layer" if one else f"{len(layers)} normalisation layers"
    update += f" ({listed}) still {'updates its' if one else 'update their'} running mean and variance in train mode"
    return [f"frozen or not, {update}: call .eval() on {'it' if one else 'them'} after model.train()"]


def _resolved_targets(blueprint: Blueprint, edit: Freeze | Unfreeze, chosen: set[str]) -> list[str]:
    """Literal paths: a module where all its parameters were chosen, else the tensors one by one."""
    found: list[str] = []
    there = parameters_at(blueprint)
    for path, below in groups_of(edit.targets, blueprint, chosen):
        whole = len(below) == there[path]
        found += [selectors.literal(path)] if whole else map(selectors.literal, below)
    return found


def groups_of(targets: Sequence[str], blueprint: Blueprint, chosen: Collection[str]) -> list[tuple[str, list[str]]]:
    """The chosen tensors by the outermost module or tensor that a target names: one row each."""
    tops: dict[str, list[str]] = {}
    named: set[str] = set()
    for target in targets:
        selector = selectors.parse(target)
        named |= selectors.matched_modules(selector, blueprint)
    for name in blueprint.by_name:
        if name in chosen:
            holders = [path for path in list(ancestors(name))[1:] if path in named]
            tops.setdefault(holders[-1] if holders else name, []).append(name)
    return list(tops.items())


def require_expected(expected: int | None, groups: Sequence[tuple[str, list[str]]]) -> None:
    """Raise RequestError where `--expect` names another number than that of the groups."""
    if expected is not None and len(groups) != expected:
        listed = ", ".join(shown(path) for path, _ in groups[:5]) + (", ..." if len(groups) > 5 else "")
        raise RequestError(f"{len(groups)} match, not the {expected} expected: {listed}")


def parameters_at(blueprint: Blueprint) -> Mapping[str, int]:
    """How many parameters each path names: its own, or those of the module at it and below."""
    return Counter(
        path for tensor in blueprint.tensors if tensor.kind == "parameter" for path in ancestors(tensor.name)
    )


def _flags(flags: Sequence[bool]) -> str:
    return "trainable" if all(flags) else "frozen" if not any(flags) else "partly frozen"
