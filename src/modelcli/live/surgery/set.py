"""set: change settings of modules, and what their constructors derive from them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.kept_weights import OVERLAP
from modelcli.edits.set import Set, setting_text, target_of
from modelcli.errors import ModelcliError, RequestError, did_you_mean
from modelcli.language import expressions, selectors
from modelcli.language.expressions import Call
from modelcli.language.quoting import quoted
from modelcli.live import bounds, modules, signatures
from modelcli.live.class_code import attributes_of
from modelcli.live.describe import describe
from modelcli.live.meta_models import build_on_meta
from modelcli.live.script import access_paths
from modelcli.live.script.grouped_calls import calls_on_each
from modelcli.live.script.source_text import InexpressibleError
from modelcli.live.script.step import Step
from modelcli.live.surgery.core import blueprint_of, brief, count, paths_of_modules, submodule
from modelcli.live.surgery.kept_weights import of_module, overlap_of
from modelcli.live.surgery.settings import UNKNOWN, setting
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import joined, shown
from modelcli.wording import listed

#: What a state dict leaves out, told with every change.
_NOT_HELD = (
    "a state dict does not hold settings: modelcli.load sets them, and so must any other program that loads the file "
    "(modelcli script shows the lines)"
)


@dataclass(frozen=True)
class _Assignment:
    """One attribute that gets a value. `path` leads from the target to the module that has it; empty for the target."""

    path: str
    name: str
    value: Any


@dataclass(frozen=True)
class _Derived:
    """What a constructor makes of other arguments: all attributes that differ, and what it keeps of each argument."""

    assignments: tuple[_Assignment, ...]
    kept: Mapping[str, Any]


@dataclass(frozen=True)
class _Plan:
    """What the settings come to at one target.

    Attributes:
        path: the first selected path of the target.
        module: the target.
        settings: the settings that change something.
        assignments: the attributes that get other values.
        children: the names of children that become None.
        changes: the rows.
        notes: what there is to say of it.
    """

    path: str
    module: nn.Module
    settings: tuple[tuple[str, Any], ...]
    assignments: tuple[_Assignment, ...]
    children: tuple[str, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def carry_out(module: nn.Module, edit: Set, context: Context) -> Applied[nn.Module]:
    plans = _plans(module, edit, blueprint_of(module, context))
    everywhere = paths_of_modules(module)
    notes: list[str] = []
    for plan in plans:
        for item in plan.assignments:
            setattr(submodule(plan.module, item.path), item.name, item.value)
        for name in plan.children:
            setattr(plan.module, name, None)
        notes += plan.notes
        names = everywhere[id(plan.module)]
        if plan.settings and len(names) > 1:
            notes.append(f"{shown(plan.path)} is one module with {len(names)} names ({listed(names, 3)})")
    notes += _notes_on_statistics(plans)
    if any(plan.assignments for plan in plans):
        notes.append(_NOT_HELD)
    changes = [change for plan in plans for change in plan.changes]
    lines = tuple(str(_settled(edit, plan)) for plan in plans if plan.settings)
    return Applied(module, [replace(changes[0], resolved=lines), *changes[1:]], notes, context.inputs)


def _settled(edit: Set, plan: _Plan) -> Set:
    return replace(edit, targets=(target_of(plan.path),), settings=plan.settings, without=(), expect=None)


def _plans(module: nn.Module, edit: Set, blueprint: Blueprint) -> list[_Plan]:
    """Return what the edit comes to at each distinct module selected. Raises RequestError for a wrong setting."""
    paths = selectors.select_modules(blueprint, edit.targets, without=edit.without, expect=edit.expect)
    distinct: dict[int, str] = {}
    for path in paths:
        distinct.setdefault(id(submodule(module, path)), path)
    return [_plan(submodule(module, path), path, edit.settings) for path in distinct.values()]


def _plan(module: nn.Module, path: str, settings: Sequence[tuple[str, Any]]) -> _Plan:
    of_children = [(name, value) for name, value in settings if name in module._modules]
    of_module = {name: value for name, value in settings if name not in module._modules}
    taken_out = [_child_taken_out(module, path, name, value) for name, value in of_children]
    by_constructor = {name: value for name, value in of_module.items() if name in _constructor_names(module)}
    notes: list[str] = []
    leaving = [name for name, _ in of_children]
    derived = _derived(module, path, by_constructor, leaving, notes) if by_constructor else None
    now: dict[str, Any] = {}
    for name, value in of_module.items():
        if derived is not None and name in derived.kept:
            now[name] = derived.kept[name]
        else:
            _require_attribute(module, path, name, value)
            now[name] = value
    was = {name: _present(module, name) for name in now}
    changed = {name: value for name, value in now.items() if not _equal(was[name], value)}
    notes += [f"{name} of {_told(module, path)} is {was[name]!r} already" for name in now if name not in changed]
    assignments = {("", name): _Assignment("", name, value) for name, value in changed.items()}
    if derived is not None and any(name in by_constructor for name in changed):
        assignments |= {(item.path, item.name): item for item in derived.assignments}
    changes = list(taken_out)
    if now:
        before, after = (", ".join(setting_text(*item) for item in values.items()) for values in (was, now))
        params = count(module)
        changes.append(Change(path, Set.name, before, after, params, params))
    children = tuple(
        name for (name, _), change in zip(of_children, taken_out, strict=True) if change.before != change.after
    )
    given = tuple((name, value) for name, value in settings if name in changed or name in children)
    return _Plan(path, module, given, tuple(assignments.values()), children, tuple(changes), tuple(notes))


def _present(module: nn.Module, name: str) -> Any:
    """Return the value that a setting has, as a word of `set` can have it; text for other values."""
    value = setting(module, name)
    return _plain(getattr(module, name, None) if value is UNKNOWN else value)


def _told(module: nn.Module, path: str) -> str:
    """A module with its type and its path, for messages."""
    return f"{type(module).__name__} at {path}" if path else type(module).__name__


def _plain(value: Any) -> Any:
    """Return a value as a word of `set` can have it; text for others."""
    if isinstance(value, torch.Size):
        return tuple(value)
    return value if _is_data(value) else repr(value)


# --- children --------------------------------------------------------------------------------------------------------


def _child_taken_out(module: nn.Module, path: str, name: str, value: Any) -> Change:
    """Return the row for a child that becomes None. Raises RequestError for any other value."""
    old, where = module._modules[name], joined(path, name)
    if value is not None:
        raise RequestError(
            f"{where} is a module, and set gives it no value but None",
            f"replace {quoted(selectors.literal(where))} MODULE",
        )
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise RequestError(
            f"{where} is a child of a {type(module).__name__}, which calls each of its children",
            f"remove {quoted(selectors.literal(where))}",
        )
    if old is None:
        return Change(where, Set.name, "None", "None", 0, 0)
    return Change(where, Set.name, brief(old), "None", count(old), 0)


# --- attributes ------------------------------------------------------------------------------------------------------


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module was made as: parametrizations give it another one."""
    return parametrize.type_before_parametrizations(module)


def _constructor_names(module: nn.Module) -> list[str]:
    try:
        return [name for name in modules.parameter_names(_class_of(module)) if name not in ("device", "dtype")]
    except (TypeError, ValueError):
        return []


def _derived(
    module: nn.Module, path: str, values: Mapping[str, Any], leaving: Collection[str], notes: list[str]
) -> _Derived | None:
    """Return the attributes that the constructor would give other values for these arguments.

    The class is built twice on the meta device: with the arguments that the module has, and with the new ones. None if
    its present arguments are not all known. `notes` gets what there is to say, such as children that stay: `leaving`
    are those that the same edit takes out.

    Raises RequestError if the constructor refuses a value, or if the tensors differ: a setting decides no shape.
    """
    old = _arguments(module)
    text = _told(module, path)
    before = None if old is None else _built(module, old, text)
    if old is None or before is None:
        return None
    call = _call(module, old, values)
    try:
        after = _construct(module, {**old, **values}, str(call))
    except RequestError as error:
        error.message = f"{text}: {error.message}"
        raise
    if (gone := _children_left_out(before, after)) and all(name in vars(module) for name in values):
        for name, value in values.items():
            _require_attribute(module, path, name, value)
        stay = [name for name in gone if module._modules.get(name) is not None and name not in leaving]
        there = [joined(path, name) for name in stay]
        if there:
            line = f"set {quoted(target_of(path))} {' '.join(f'{name}=None' for name in stay)}"
            its, it = ("its", "it") if len(there) == 1 else ("their", "them")
            notes.append(f"{listed(there, 3)} and {its} tensors stay: {line} takes {it} out")
        return _Derived((), values)
    _require_same_tensors(before, after, call, path, values)
    kept = {name: value for name in values if (value := setting(after, name)) is not UNKNOWN}
    if lost := next((name for name in values if name not in kept), None):
        raise RequestError(
            f"{text} does not keep {lost}: only its constructor uses it", f"replace it by {quoted(str(call))}"
        )
    assignments = tuple(_differences(module, path, before, after))
    for name, value in kept.items():
        _require_kind(module, path, name, _present(module, name), value)
        _require_read(module, path, name, assignments)
    return _Derived(assignments, kept)


def _require_read(module: nn.Module, path: str, name: str, assignments: Sequence[_Assignment]) -> None:
    """Raise RequestError where code that runs reads neither a setting nor anything that is derived from it."""
    own = dict(module.named_modules(remove_duplicate=False))
    assigned = [item for item in assignments if item.path or item.name != name]
    for item in (_Assignment("", name, None), *assigned):
        attributes = attributes_of(_class_of(own[item.path]))
        if attributes is None or item.name in attributes.read:
            return
    raise _read_by_constructor_alone(module, path, name)


def _read_by_constructor_alone(module: nn.Module, path: str, name: str) -> RequestError:
    return RequestError(
        f"{name} of {_told(module, path)} is read only when the module is made, so another value would change nothing",
        "name a model that is made with it: -m REFERENCE",
    )


def _require_kind(module: nn.Module, path: str, name: str, old: Any, new: Any) -> None:
    """Raise RequestError where a text would take the place of a number, or a number that of a text or of a tuple."""
    fits = not (isinstance(old, int | float) and isinstance(new, str))
    if isinstance(old, bool) or isinstance(new, bool):
        fits = isinstance(old, bool | None) and isinstance(new, bool | None)
    if not fits:
        raise _of_another_type(module, path, name, old, new)


def _of_another_type(module: nn.Module, path: str, name: str, old: Any, new: Any) -> RequestError:
    return RequestError(
        f"{name} of {_told(module, path)} is {old!r}, and {new!r} is of another type",
        f"write a value like it: {name}={expressions.to_text(_plain(old))}",
    )


def _differences(module: nn.Module, path: str, before: nn.Module, after: nn.Module) -> Iterator[_Assignment]:
    """Yield the attributes of a module, and of those inside it, that have other values in `after` than in `before`."""
    old = dict(before.named_modules(remove_duplicate=False))
    own = dict(module.named_modules(remove_duplicate=False))
    for inner, now in after.named_modules(remove_duplicate=False):
        for name, value in vars(now).items():
            if not _is_setting(name, value) or _equal(value, vars(old[inner]).get(name, UNKNOWN)):
                continue
            if inner not in own or _class_of(own[inner]) is not _class_of(now):
                where = joined(path, inner)
                raise RequestError(
                    f"the setting changes {name} of {where}, where this model has another module",
                    "set the modules inside it by their own paths",
                )
            yield _Assignment(inner, name, value)


def _children_left_out(before: nn.Module, after: nn.Module) -> list[str]:
    """Return the children that `after` lacks, if that is all in which its tensors differ; else none."""
    gone = [name for name, child in before._modules.items() if child is not None and after._modules.get(name) is None]
    below = tuple(f"{name}." for name in gone)
    left = {name: shape for name, shape in _shapes(before).items() if not name.startswith(below)} if gone else {}
    return gone if gone and left == _shapes(after) else []


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """Return the arguments of the constructor that the module's attributes give; None if a required one is missing."""
    kind = _class_of(module)
    found = {}
    for name in _constructor_names(module):
        value = setting(module, name)
        if value is not UNKNOWN:
            found[name] = value
    try:
        parameters = signatures.of(kind).parameters
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()) and not found:
        return None
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    return found if all(name in found for name in required) else None


def _construct(module: nn.Module, arguments: Mapping[str, Any], text: str) -> nn.Module:
    kind = _class_of(module)

    def construct() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model was made before, and this one is only looked at
            return modules.construct(kind, [], dict(arguments), text)

    return build_on_meta(construct, only_if_needed=True, bounds=bounds.as_typed(text))


def _built(module: nn.Module, arguments: Mapping[str, Any], text: str) -> nn.Module | None:
    """Return the module that the present arguments make; None if they do not make one, as when two are derived."""
    try:
        return _construct(module, arguments, text)
    except ModelcliError:
        return None


def _call(module: nn.Module, old: Mapping[str, Any], values: Mapping[str, Any]) -> Call:
    """Return the expression for the module with other arguments; `_` keeps those that differ from their default."""
    kind = _class_of(module)
    parameters = signatures.of(kind).parameters
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name in _constructor_names(module):
        default = parameters[name].default if name in parameters else UNKNOWN
        if name in values or (name in old and not _is_default(default, old[name])):
            value = values.get(name, expressions.HOLE)
            positional = name in parameters and default is inspect.Parameter.empty and not kwargs
            if positional:
                args.append(value)
            else:
                kwargs[name] = value
    return Call(kind.__name__, tuple(args), kwargs)


def _carries_over(before: nn.Module, after: nn.Module, path: str) -> bool:
    """Whether `replace --keep-weights` carries values over from one module to the other."""
    try:
        return bool(overlap_of(of_module(before, path, after), OVERLAP))
    except ModelcliError:
        return False


def _is_default(default: Any, value: Any) -> bool:
    """Whether a setting has the default of its argument; `padding=0` is kept as `(0, 0)`."""
    if isinstance(value, tuple) and not isinstance(default, tuple):
        return bool(value) and all(_equal(default, item) for item in value)
    return _equal(default, value)


def _require_same_tensors(
    before: nn.Module, after: nn.Module, call: Call, path: str, values: Mapping[str, Any]
) -> None:
    """Raise RequestError where the new arguments make other modules or parameters, or buffers that are not there.

    Buffers may go: those of a normalisation layer stay where they are, as when PyTorch's attribute is assigned.
    """
    old, new = _shapes(before), _shapes(after)
    parameters = {name for one in (before, after) for name, _ in one.named_parameters(remove_duplicate=False)}
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    changed = [name for name in changed if name in parameters or name in new]
    types = {inner: type(part) for inner, part in before.named_modules(remove_duplicate=False)}
    now = {inner: type(part) for inner, part in after.named_modules(remove_duplicate=False)}
    changed += [inner for inner in {**types, **now} if types.get(inner) is not now.get(inner)]
    if not changed:
        return
    told = ", ".join(setting_text(name, value) for name, value in values.items())
    keep = " --keep-weights" if _carries_over(before, after, path) else ""
    raise RequestError(
        f"{told} changes {joined(path, changed[0])}, and set changes no tensor and no module",
        f"replace {quoted(selectors.literal(path))} {quoted(str(call))}{keep}"
        if path
        else f"-m {quoted(str(call))} is a model that is made with it",
    )


def _is_setting(name: str, value: Any) -> bool:
    """Whether an attribute is plain data or a function, and not one that every module has."""
    return name not in _OWN and (_is_data(value) or inspect.isroutine(value) or inspect.isclass(value))


def _is_data(value: Any) -> bool:
    """Whether a value is a number, a text, None, or a list, tuple or dictionary of them."""
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    if isinstance(value, dict):
        return all(map(_is_data, (*value, *value.values())))
    return isinstance(value, bool | int | float | str | None)


#: The attributes that every module has.
_OWN = frozenset(vars(nn.Module()))


def _equal(one: Any, other: Any) -> bool:
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # a value of a class of the user's may compare as it likes
        return one is other


def _require_attribute(module: nn.Module, path: str, name: str, value: Any) -> None:
    """Raise RequestError unless running the module reads an attribute that has a plain value like the new one."""
    told = _told(module, path)
    if name in module._parameters or name in module._buffers:
        raise RequestError(
            f"{joined(path, name)} is a tensor, and set changes no tensor", "init draws other values for it"
        )
    known = _settings_of(module)
    if name == "training":
        raise RequestError(
            "training is the mode of a module, which no file holds", "call .train() or .eval() on the loaded model"
        )
    if name not in vars(module) or name in _OWN or name.startswith("_") or not _is_data(vars(module)[name]):
        near = did_you_mean(name, known)
        raise RequestError(
            f"{told} has no setting {name!r}", near or (f"it has {listed(known, 12)}" if known else None)
        )
    attributes = attributes_of(_class_of(module))
    if attributes is not None and name not in attributes.read:
        raise _read_by_constructor_alone(module, path, name)
    old = vars(module)[name]
    if not _fits(old, value):
        raise _of_another_type(module, path, name, old, value)


def _settings_of(module: nn.Module) -> list[str]:
    """Return the names of the settings that a module has, those of its constructor first."""
    plain = {name for name, value in vars(module).items() if name not in _OWN and _is_data(value)}
    names = [name for name in _constructor_names(module) if setting(module, name) is not UNKNOWN]
    return list(dict.fromkeys([*names, *sorted(name for name in plain if not name.startswith("_"))]))


def _fits(old: Any, new: Any) -> bool:
    """Whether a value may take the place of another one: numbers for numbers, a tuple for one as long, None for any."""
    if old is None or new is None:
        return True
    if isinstance(old, bool) or isinstance(new, bool):
        return isinstance(old, bool) and isinstance(new, bool)
    if isinstance(old, int | float):
        return isinstance(new, int | float)
    if isinstance(old, tuple | list):
        return isinstance(new, tuple | list) and len(old) == len(new)
    return type(old) is type(new)


def _notes_on_statistics(plans: Sequence[_Plan]) -> list[str]:
    """Return the note that running statistics stay, where settings end their updates."""
    paths = [
        shown(plan.path)
        for plan in plans
        if ("track_running_stats", False) in plan.settings and plan.module._buffers.get("running_mean") is not None
    ]
    if not paths:
        return []
    keep = "keeps its" if len(paths) == 1 else "keep their"
    return [
        f"{listed(paths, 3)} {keep} running mean and variance: eval mode uses them, train mode no longer updates them"
    ]


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Set, step: Step) -> list[str]:
    statements: dict[str, list[str]] = {}
    for plan in _plans(step.before, edit, describe(step.before)):
        for item in plan.assignments:
            if not _is_data(item.value):
                raise InexpressibleError(f"{item.name} becomes {item.value!r}, which has no spelling of its own")
            statement = f".{item.name} = {step.script.value(item.value)}"
            statements.setdefault(statement, []).append(joined(plan.path, item.path) if item.path else plan.path)
        for name in plan.children:
            statements.setdefault(f".{name} = None", []).append(plan.path)
    return [
        line
        for statement, paths in statements.items()
        for line in calls_on_each(
            paths, lambda path: access_paths.module_expression(step.before, path), "get_submodule", statement
        )
    ]
