"""remove: a model without some of its modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.remove import Remove, picked_to_remove
from modelcli.language import selectors
from modelcli.live.class_code import attributes_of
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.state import State, renumber_keys
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.surgery.core import blueprint_of, brief, count, is_numbered, put_children, submodule
from modelcli.model.paths import lies_in, parent_of


def carry_out(module: nn.Module, edit: Remove, context: Context) -> Applied[nn.Module]:
    """Take modules out."""
    paths, _ = picked_to_remove(edit, blueprint_of(module, context), root_type=type(module).__name__)
    changes = []
    holders: dict[int, tuple[nn.Module, dict[str, None]]] = {}
    for path in paths:
        above, _, name = path.rpartition(".")
        holder = submodule(module, above)
        holders.setdefault(id(holder), (holder, {}))[1].setdefault(name)
        old = submodule(module, path)
        after = "None" if may_be_none(holder, name) else ""
        changes.append(Change(path, edit.name, brief(old), after, count(old), 0))
    for holder, gone in holders.values():
        for name in [name for name in gone if may_be_none(holder, name)]:
            setattr(holder, name, None)
            del gone[name]
        _take_out(holder, gone)
    line = str(Remove(targets=tuple(map(selectors.literal, paths)), renumber=edit.renumber))
    return Applied(module, [replace(changes[0], resolved=(line,)), *changes[1:]], inputs=context.inputs)


def may_be_none(holder: nn.Module, name: str) -> bool:
    """Whether the code of a module's class compares its child with None: it runs without that child if it is None."""
    if isinstance(holder, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    if not access_paths.uses_torch_methods(holder, "__setattr__"):
        return False
    attributes = attributes_of(type(holder))
    return attributes is not None and name in attributes.optional


def _take_out(holder: nn.Module, gone: dict[str, None]) -> None:
    """Take children out; in a sequence whose children are numbered the later ones move down."""
    left = {name: child for name, child in holder._modules.items() if name not in gone}
    if is_numbered(holder):
        left = {str(number): child for number, child in enumerate(left.values())}
    put_children(holder, left)


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Remove, step: Step) -> list[str]:
    paths = _distinct(step.before, edit.targets)
    lines: list[str] = []
    for path in reversed(paths):
        above, _, name = path.rpartition(".")
        if may_be_none(submodule(step.before, above), name):
            lines.append(f"{access_paths.module_expression(step.before, path)} = None")
        else:
            lines += access_paths.remove_statements(step.before, path)
    return lines


def _distinct(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The paths that selectors pick, less those that lead to the same child of the same module again."""
    found: dict[tuple[int, str], str] = {}
    for path in selectors.select_modules(describe(model), targets):
        above, _, own = path.rpartition(".")
        found.setdefault((id(model.get_submodule(above)), own), path)
    return list(found.values())


def state_dict_script_lines(edit: Remove, step: StateDictStep, state: State) -> list[str]:
    """The keys that go, and new names for those that move down."""
    blueprint, names = step.before.blueprint, list(step.before.keys)
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
            lines += renumber_keys(left, holder, lambda n, numbers=numbers: n - sum(g < n for g in numbers), state)  # type: ignore[misc]
    return lines
