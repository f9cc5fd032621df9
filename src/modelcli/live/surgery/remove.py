"""remove: a model without some of its modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.picking import are_numbers
from modelcli.edits.remove import Remove
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live import composites
from modelcli.live.build import Bare
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.state import State, moved
from modelcli.live.script.step import Step
from modelcli.live.surgery import numbering
from modelcli.live.surgery.core import blueprint_of, brief, count, is_numbered, put_children, submodule
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import joined, lies_in, parent_of, shown
from modelcli.model.tensors import TensorInfo


def carry_out(module: nn.Module, edit: Remove, context: Context) -> Applied[nn.Module]:
    """Take modules out, and in a checkpoint of unknown architecture single tensors as well."""
    described = blueprint_of(module, context)
    blueprint = _with_other_entries(module, described)
    paths, names = _picked(module, blueprint, edit)
    if "" in paths:
        raise RequestError("the model itself cannot be removed", "extract PATH makes a part of it the model")
    selectors.refuse_nested([*paths, *names], "remove")
    selectors.require_expected(edit.expect, [*paths, *names])
    changes = []
    holders: dict[int, tuple[nn.Module, str, dict[str, None]]] = {}
    for path in paths:
        above, _, name = path.rpartition(".")
        holder = submodule(module, above)
        holders.setdefault(id(holder), (holder, above, {}))[2].setdefault(name)
        old = submodule(module, path)
        changes.append(Change(path, edit.name, brief(old), "", count(old), 0))
    notes = []
    for holder, above, gone in holders.values():
        if _take_out(holder, gone, renumber=edit.renumber):
            notes.append(_keep_their_numbers("children", above))
    gone_tensors: dict[str, list[str]] = {}
    for name in names:
        size = blueprint.by_name[name].elements if blueprint.by_name[name].kind == "parameter" else 0
        what = "1 tensor" if name in described.by_name else "1 entry"
        changes.append(Change(name, edit.name, what, "", size, 0))
        gone_tensors.setdefault(parent_of(name), []).append(name.rpartition(".")[2])
    for above, own in gone_tensors.items():
        notes += _take_tensors(submodule(module, above), above, own, renumber=edit.renumber)
    if isinstance(module, Bare):
        _prune(module)
        if not describe(module).tensors:
            raise RequestError(f"remove {', '.join(edit.targets)} would leave no tensor")
    line = str(Remove(targets=tuple(map(selectors.literal, [*paths, *names])), renumber=edit.renumber))
    return Applied(module, [replace(changes[0], resolved=(line,)), *changes[1:]], notes, context.inputs)


def _with_other_entries(module: nn.Module, blueprint: Blueprint) -> Blueprint:
    """A blueprint that also has the entries of a bare file that are no tensors (`_extra_state`), as empty ones."""
    known = blueprint.by_name
    state = module.state_dict(keep_vars=True) if isinstance(module, Bare) else {}
    others = [TensorInfo(name, (0,), "uint8", "buffer") for name in state if name not in known]
    return replace(blueprint, tensors=(*blueprint.tensors, *others)) if others else blueprint


def _picked(module: nn.Module, blueprint: Blueprint, edit: Remove) -> tuple[list[str], list[str]]:
    """The modules that the targets name, and the tensors where they name no module."""
    of_modules, of_tensors = [], []
    for target in edit.targets:
        selector = selectors.parse(target)
        if selectors.matched_modules(selector, blueprint):
            of_modules.append(target)
        elif selectors.matched_tensors(selector, blueprint):
            of_tensors.append(target)
        else:
            raise selectors.no_match(selector, blueprint)
    if of_tensors and not isinstance(module, Bare):
        raise RequestError(
            f"{of_tensors[0]} is a tensor of {type(module).__name__}, and remove takes modules out",
            "replace puts a module without it in the place of the one that holds it: 'Linear(_,_,bias=False)'",
        )
    paths, names = [], []
    without = edit.without
    if of_modules:
        paths = selectors.select_modules(blueprint, of_modules, without=() if of_tensors else without)
    if of_tensors:
        names = selectors.select_tensors(blueprint, of_tensors)
        taken = {name for target in without for name in selectors.select_tensors(blueprint, [target])}
        excluded = {
            path for target in without for path in selectors.matched_modules(selectors.parse(target), blueprint)
        }
        names = [name for name in names if name not in taken]
        paths = [path for path in paths if path not in excluded]
        if not names and not paths:
            raise RequestError("--except takes away all that was selected")
    return paths, names


def _take_out(holder: nn.Module, gone: dict[str, None], *, renumber: bool) -> bool:
    """Take children out. Gives whether numbered ones keep their numbers only because nothing says what they are."""
    left = {name: child for name, child in holder._modules.items() if name not in gone}
    numbers = are_numbers(holder._modules)
    if is_numbered(holder):
        left = {str(number): child for number, child in enumerate(left.values())}
    elif isinstance(holder, Bare) and numbers and renumber:
        left = {str(int(name) - sum(int(n) < int(name) for n in gone)): child for name, child in left.items()}
    put_children(holder, left)
    if renumber and isinstance(holder, Bare) and not numbers:
        raise RequestError("--renumber is for children called 0, 1, 2, and some here have other names", "leave it out")
    later = numbers and any(int(name) > min(map(int, gone)) for name in left)
    return isinstance(holder, Bare) and later and not renumber


def _take_tensors(holder: nn.Module, path: str, gone: list[str], *, renumber: bool) -> list[str]:
    """Take tensors out of a module of unknown type; what is called by later numbers moves down where that is asked.

    Returns:
        A note where later ones keep their numbers only because nothing says that they are a sequence.
    """
    assert isinstance(holder, Bare)
    numbers = are_numbers(gone)
    if renumber and not numbers:
        named = next(name for name in gone if not are_numbers([name]))
        raise RequestError(
            f"--renumber is for what is called 0, 1, 2, and {joined(path, named)} has another name", "leave it out"
        )
    for name in gone:
        holder._parameters.pop(name, None)
        holder._buffers.pop(name, None)
        for key, hook in list(holder._state_dict_hooks.items()):
            if isinstance(hook, composites.Kept) and hook.name == name:
                del holder._state_dict_hooks[key]
    if not numbers or not any(number > min(map(int, gone)) for number in numbering.numbers_in(holder)):
        return []
    if not renumber:
        return [_keep_their_numbers("tensors", path)]
    taken = [int(name) for name in gone]
    numbering.renumber(holder, lambda number: number - sum(other < number for other in taken))
    return []


def _keep_their_numbers(what: str, path: str) -> str:
    return (
        f"the later {what} of {shown(path)} keep their numbers: nothing in the file says that they are a sequence; "
        "--renumber moves them down"
    )


def _prune(module: nn.Module) -> None:
    """Take out what holds nothing any more: modules of a bare checkpoint are there for their tensors."""
    for name, child in list(module._modules.items()):
        if isinstance(child, Bare):
            _prune(child)
            if not (child._modules or child._parameters or child._buffers or child._state_dict_hooks):
                del module._modules[name]


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Remove, step: Step) -> list[str]:
    paths = _distinct(step.before, edit.targets)
    return [line for path in reversed(paths) for line in access_paths.take_out(step.before, path)]


def _distinct(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The paths that selectors pick, less those that lead to the same child of the same module again."""
    found: dict[tuple[int, str], str] = {}
    for path in selectors.select_modules(describe(model), targets):
        above, _, own = path.rpartition(".")
        found.setdefault((id(model.get_submodule(above)), own), path)
    return list(found.values())


def state_dict_script_lines(edit: Remove, step: Step, state: State) -> list[str]:
    """The keys that go, and new names for those that move down."""
    blueprint, names = describe(step.before), list(step.before.state_dict())
    paths = []
    for target in edit.targets:
        selector = selectors.parse(target)
        paths += sorted(
            selectors.matched_modules(selector, blueprint) or selectors.matched_tensors(selector, blueprint)
        )
    gone = [name for name in names if lies_in(name, paths)]
    lines = state.delete(gone, [path for path in paths if path in blueprint.by_path])
    if edit.renumber:
        left = [name for name in names if name not in gone]
        for holder in dict.fromkeys(map(parent_of, paths)):
            numbers = [int(path.rpartition(".")[2]) for path in paths if parent_of(path) == holder]
            lines += moved(left, holder, lambda n, numbers=numbers: n - sum(g < n for g in numbers), state)  # type: ignore[misc]
    return lines
