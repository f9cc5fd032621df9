"""init: new values for parameters, drawn by a function of `torch.nn.init` or a module's own `reset_parameters`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.init import Init
from modelcli.edits.picking import groups_of, names_of_one, tie_notes
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.grouped_calls import calls_on_each
from modelcli.live.script.source_text import STATEMENTS, InexpressibleError, SourceText, loop
from modelcli.live.script.source_text import quoted as literal
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.sources import named_tensors
from modelcli.live.surgery.core import blueprint_of
from modelcli.live.surgery.init.drawing import Drawing, drawn_sources, nothing_to_initialise
from modelcli.live.surgery.init.filling import drawing_by_scheme, is_bias, layers_of, layers_of_keys
from modelcli.live.surgery.init.resetting import drawing_by_reset, refuse_arguments_of_default
from modelcli.live.surgery.schemes import DEFAULT, scheme_name
from modelcli.live.surgery.state_dicts import meta_tensors, viewing
from modelcli.live.surgery.storages import has_storage, key_of, replace_storage, shown_by, viewers
from modelcli.model.blueprint import Blueprint
from modelcli.model.shared_bytes import Shown, sharing_bytes
from modelcli.model.state_dict import StateDictModel


def carry_out(module: nn.Module, edit: Init, context: Context) -> Applied[nn.Module]:
    blueprint = blueprint_of(module, context)
    selected = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    tensors = named_tensors(module)
    names = [name for name in selected if name in tensors]
    if not names:
        raise nothing_to_initialise(edit)
    if scheme_name(edit.scheme) == DEFAULT:
        drawing = drawing_by_reset(module, edit, blueprint, names)
    else:
        drawing = drawing_by_scheme(edit, blueprint, names, tensors, layers_of(module, blueprint))
    changes = _changes(edit, blueprint, names, drawing)
    views = viewers(module)
    chosen = {id(tensors[name]) for name in drawing.filled}
    for key, source in drawn_sources(drawing, views, chosen, context.seed).items():
        replace_storage(views[key], source)
    notes = _notes_on(drawing, blueprint, selected, names, shown_by(module))
    return Applied(module, changes, notes, context.inputs)


def apply_to_state_dict(edit: Init, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
    """Return the model with new sources for the selected tensors; the values are drawn when they are written."""
    blueprint = model.blueprint
    selected = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    names = [name for name in selected if name in model.tensors]
    if not names:
        raise nothing_to_initialise(edit)
    if scheme_name(edit.scheme) == DEFAULT:
        refuse_arguments_of_default(edit)
        raise RequestError(
            "default calls each module's reset_parameters, but a plain state dict records no classes",
            "pass --arch REFERENCE, or name a scheme: xavier_uniform",
        )
    tensors = meta_tensors(model, viewing(model, names))
    drawing = drawing_by_scheme(edit, blueprint, names, tensors, layers_of_keys(model))
    changes = _changes(edit, blueprint, names, drawing)
    views: dict[int, dict[int, torch.Tensor]] = {}
    storages: dict[int, object] = {}
    for name, tensor in tensors.items():
        if has_storage(tensor):
            views.setdefault(key_of(tensor), {})[id(tensor)] = tensor
            storages[key_of(tensor)] = model.tensors[name].storage
    chosen = {id(tensors[name]) for name in drawing.filled}
    drawn = drawn_sources(drawing, {key: list(found.values()) for key, found in views.items()}, chosen, context.seed)
    notes = _notes_on(drawing, blueprint, selected, names, model.shown)
    sources = {storages[key]: source for key, source in drawn.items()}
    return Applied(model.with_sources(sources), changes, notes, context.inputs)


def _changes(edit: Init, blueprint: Blueprint, names: Sequence[str], drawing: Drawing) -> list[Change]:
    """Return one change for each outermost module or tensor that a target names."""
    known = blueprint.by_name
    filled = {known[name].identity: text for name, text in drawing.filled.items()}
    groups = groups_of(edit.targets, blueprint, {name for name in names if known[name].identity in filled})
    selectors.require_expected(edit.expect, [path for path, _ in groups])
    changes = []
    for path, below in groups:
        own = {known[name].identity: known[name] for name in below}
        size = sum(tensor.elements for tensor in own.values() if tensor.kind == "parameter")
        after = min((filled[key] for key in own), key=drawing.texts.index)
        changes.append(Change(path, edit.name, "as it was", after, size, size))
    return [replace(changes[0], resolved=drawing.lines), *changes[1:]]


def _notes_on(
    drawing: Drawing,
    blueprint: Blueprint,
    selected: Sequence[str],
    names: Sequence[str],
    shown: Mapping[str, Shown],
) -> list[str]:
    """Return the notes on an edit. `names` are the selected tensors that can be initialised."""
    notes = [*drawing.notes, *tie_notes(names_of_one(blueprint), names, "initialised")]
    notes += _view_notes(shown, set(drawing.filled))
    dense = set(names)
    return notes + [f"{name} keeps its values: it is not a dense tensor" for name in selected if name not in dense]


def _view_notes(shown: Mapping[str, Shown], filled: set[str]) -> list[str]:
    """Notes on other tensors that share memory with the initialised ones."""
    views = [
        f"{name} shares memory with {picked}, so its values change too"
        for name, picked in sharing_bytes(shown, filled).items()
    ]
    return views if len(views) <= 3 else [*views[:3], f"{len(views) - 3} more tensors change with them"]


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Init, step: Step) -> list[str]:
    script, model, lines = step.script, step.before, step.seed_statements()
    blueprint = describe(model)
    if scheme_name(edit.scheme) == DEFAULT:
        if edit.without:
            raise InexpressibleError("reset_parameters draws all the tensors of a module, and some are kept here")
        paths = selectors.select_modules(blueprint, edit.targets)
        return [
            *lines,
            *calls_on_each(
                paths, lambda path: access_paths.module_expression(model, path), "get_submodule", ".reset_parameters()"
            ),
        ]
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    infos = {blueprint.by_name[name].identity: name for name in reversed(names)}
    chosen = [name for name in names if name in infos.values() and blueprint.by_name[name].kind == "parameter"]
    script.imports.add("from torch.nn import init")
    return lines + fills(
        script, chosen, edit, lambda name: access_paths.tensor_expression(model, name), "model.get_parameter(name)"
    )


def fills(script: SourceText, names: Sequence[str], edit: Init, text: Callable[[str], str], any_text: str) -> list[str]:
    """Return the calls that fill tensors, in order; runs of the same call become loops.

    `any_text` is the expression for the tensor whose name is in the variable `name`.
    """
    lines: list[str] = []
    rest = list(names)
    if scheme_name(edit.bias) in ("zeros", "ones", "constant"):  # draws no random values, so these calls may come last
        rest = [name for name in names if not is_bias(name)] + [name for name in names if is_bias(name)]
    while rest:
        scheme = edit.bias if is_bias(rest[0]) else edit.scheme
        run = [rest[0]]
        while len(run) < len(rest) and is_bias(rest[len(run)]) == is_bias(run[0]):
            run.append(rest[len(run)])
        arguments = script.arguments(scheme.args, scheme.kwargs)
        arguments = f", {arguments}" if arguments else ""
        function = f"init.{scheme_name(scheme)}_"
        if len(run) > STATEMENTS:
            lines += loop("name", run, f"{function}({any_text}{arguments})")
        else:
            lines += [f"{function}({text(name)}{arguments})" for name in run]
        rest = rest[len(run) :]
    return lines


def state_dict_script_lines(edit: Init, step: StateDictStep, state: State) -> list[str]:
    if scheme_name(edit.scheme) == DEFAULT:
        raise InexpressibleError(
            f"plain PyTorch has no statements for {edit.name} on a file that records no architecture"
        )
    blueprint = step.before.blueprint
    chosen = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    chosen = [name for name in chosen if blueprint.by_name[name].tied_to not in chosen]
    step.script.imports.add("from torch.nn import init")
    return step.seed_statements() + fills(
        step.script, chosen, edit, lambda name: f"state[{literal(name)}]", "state[name]"
    )
