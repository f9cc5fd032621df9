"""wrap: put a new module around modules that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.picking import parts_below
from modelcli.edits.wrap import Wrap, refuse_apart, resolved_lines, wrapped_paths
from modelcli.errors import RequestError
from modelcli.language import expressions
from modelcli.live import modules
from modelcli.live.describe import describe, dtype_name
from modelcli.live.modules import ConstructorError
from modelcli.live.script import access_paths
from modelcli.live.script.new_modules import new_statements, tensor_names
from modelcli.live.script.source_text import NN, STATEMENTS, InexpressibleError, loop
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.sources import is_lazy, named_tensors
from modelcli.live.surgery.core import blueprint_of, brief, count, submodule
from modelcli.live.surgery.new_modules import new_for_keys
from modelcli.live.surgery.replace import targets_of
from modelcli.live.surgery.state_dicts import new_module
from modelcli.live.surgery.wrapping import filled, wrapped
from modelcli.live.walking import modules_in
from modelcli.model.paths import joined, shown
from modelcli.model.state_dict import NewModule, Part, StateDictModel, split_key
from modelcli.providers.known_code import names_known_code


def carry_out(module: nn.Module, edit: Wrap, context: Context) -> Applied[nn.Module]:
    targets = targets_of(module, wrapped_paths(edit, blueprint_of(module, context)))
    for target in targets:
        refuse_apart(target.paths, target.everywhere)
    before = [(brief(target.module), count(target.module)) for target in targets]
    news = wrapped(module, edit.module, [(target.module, target.paths[0]) for target in targets], context)
    model, changes = module, []
    for target, (old, size), new in zip(targets, before, news, strict=True):
        for path in target.paths:
            parent, _, name = path.rpartition(".")
            if path:
                submodule(module, parent)._modules[name] = new
            else:
                model = new
            changes.append(Change(path, edit.name, old, expressions.to_text(edit.module), size, count(new)))
    lines = resolved_lines(edit, [target.paths for target in targets])
    return Applied(model, [replace(changes[0], resolved=tuple(lines)), *changes[1:]], inputs=context.inputs)


# --- state-dict models -----------------------------------------------------------------------------------------------


class UnknownModule(nn.Module):
    """Takes the place of an old module of which only the keys are known."""


def apply_to_state_dict(edit: Wrap, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
    """Return the model with the keys of the old modules below the place that they get in the new ones.

    Raises RequestError for a wrapper that needs more of the old module than to hold it.
    """
    paths = wrapped_paths(edit, model.blueprint)
    places = [UnknownModule() for _ in paths]
    olds = [model.modules[path].made for path in paths]
    modes = [(old is None or old.training, path) for old, path in zip(olds, paths, strict=True)]
    try:
        news = new_for_keys(model, [filled(edit.module, place) for place in places], context, modes)
    except ConstructorError as error:
        raise RequestError(
            f"{error.message}: the file records no architecture, so of the old module only the keys are known",
            "--arch names the architecture",
        ) from error
    briefs = parts_below(model, paths)
    placed, changes, number = dict[str, NewModule](), [], model.next_identity
    for path, place, new in zip(paths, places, news, strict=True):
        made = new_module(new, number)
        number += made.identities
        placed[path] = _around(model, path, new, place, made)
        old = briefs[path]
        text = expressions.to_text(edit.module)
        changes.append(Change(path, edit.name, old.brief, text, old.params, old.params + made.params))
    lines = resolved_lines(edit, [[path] for path in paths])
    changes[0] = replace(changes[0], resolved=tuple(lines))
    return Applied(model.with_modules(placed), changes, inputs=context.inputs)


def _around(model: StateDictModel, path: str, new: nn.Module, place: nn.Module, made: NewModule) -> NewModule:
    """Return what a wrapper made, with the module at `path` of the model instead of `place`."""
    below = model.modules_below(path)
    places = _places_of(place, new)
    if not places:
        raise RequestError(f"what the wrapper makes of {shown(path)} does not hold it", "--arch names the architecture")
    parts: list[Part] = []
    for at, module, own in made.parts:
        if at not in places:
            parts.append((at, module, own))
            continue
        for other in below:
            inside = other.removeprefix(path).removeprefix(".") if path else other
            entries = [(split_key(name)[1], model.entries[name]) for name in model.own_entries[other]]
            parts.append((joined(at, inside) if inside else at, model.modules[other], entries))
    return replace(made, parts=tuple(parts))


def _places_of(place: nn.Module, new: nn.Module) -> list[str]:
    return [path for path, part in new.named_modules(remove_duplicate=False) if part is place]


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Wrap, step: Step) -> list[str]:
    return script_lines_together([edit], step)


def script_lines_together(edits: Sequence[Wrap], step: Step) -> list[str]:
    """Write the lines that one edit resolved to. None of the modules is inside another one."""
    blueprint = describe(step.before)
    picked = [(edit, wrapped_paths(edit, blueprint)) for edit in edits]
    lines = [] if all(_draws_nothing(edit, paths[0], step) for edit, paths in picked) else step.seed_statements()
    plain = [paths[0] for _, paths in picked if len(paths) == 1]
    texts = {_written(edit, paths[0], "model.get_submodule(name)", step) for edit, paths in picked}
    if (
        len(plain) == len(picked) > STATEMENTS
        and len(texts) == 1
        and all(path and access_paths.is_plain_assignment(step.before, path) for path in plain)
    ):
        return [*lines, *loop("name", plain, f"model.set_submodule(name, {texts.pop()})")]
    for edit, paths in picked:
        first, *others = paths
        old = access_paths.module_expression(step.before, first)
        new = _written(edit, first, old, step)
        lines.append(access_paths.replace_statement(step.before, first, new) if first else f"model = {new}")
        lines += [access_paths.replace_statement(step.before, path, _at(step, first)) for path in others]
    return lines


def _at(step: Step, path: str) -> str:
    return access_paths.module_expression(step.after, path)


def _draws_nothing(edit: Wrap, path: str, step: Step) -> bool:
    """Whether a wrapper of torch's own classes brings no tensor."""
    before, after = (len(named_tensors(submodule(model, path))) for model in (step.before, step.after))
    return before == after and names_known_code(edit.module)


@dataclass(frozen=True)
class _Expression:
    """Python code in the place of a value."""

    code: str

    def __repr__(self) -> str:
        return self.code


def _written(edit: Wrap, path: str, old: str, step: Step) -> str:
    """Return the call of the wrapper with the module of the expression `old`, with its dtype and mode in the model."""
    was, new = submodule(step.before, path), submodule(step.after, path)
    text = step.script.value(filled(edit.module, _Expression(old)))
    dtypes = {dtype_name(t.dtype) for t in named_tensors(new).values() if not is_lazy(t) and t.is_floating_point()}
    is_larger = len(named_tensors(new)) > len(named_tensors(was))
    if is_larger and dtypes != {"float32"} and not expressions.gives(edit.module, "dtype"):
        if len(dtypes) > 1:
            raise InexpressibleError(f"the tensors of {path or 'the model'} have several dtypes")
        text += "".join(f".to(torch.{dtype})" for dtype in dtypes)
    if new.training:
        return text
    if any(part.training for part in modules_in(new)):
        raise InexpressibleError(f"a part of {path or 'the model'} is in train mode, and the others are not")
    return f"{text}.eval()"


def state_dict_script_lines(edit: Wrap, step: StateDictStep, state: State) -> list[str]:
    """Move the keys, and add those of the new module, which is made around a module without tensors."""
    lines: list[str] = []
    paths = wrapped_paths(edit, step.before.blueprint)
    seed = step.seed
    for path in paths:
        place = UnknownModule()
        new = modules.make(filled(edit.module, place))
        at, *others = _places_of(place, new)
        if others:
            raise InexpressibleError(f"the module at {shown(path)} would have several places")
        names = list(state.names)
        prefix = joined(path, "")
        inner = joined(joined(path, at), "")
        moved = {name: inner + name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        lines += state.rename({name: moved.get(name, name) for name in names})
        step.script.imports.add(NN)
        call = filled(edit.module, _Expression("nn.Identity()"))
        made = step.new(path)
        added = new_statements(step.script, call, made, seed)
        if added:
            seed = None
            lines += [*added, *state.put_new_module(prefix, tensor_names(made))]
    return lines


__all__ = [
    "apply_to_state_dict",
    "carry_out",
    "script_lines",
    "script_lines_together",
    "state_dict_script_lines",
]
