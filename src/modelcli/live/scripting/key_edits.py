"""Edits of a bare checkpoint as statements on its state dict, which is called `state`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from modelcli import selectors
from modelcli.blueprints import Blueprint, ancestors, joined, parent_of
from modelcli.edits import Add, Cast, Edit, Extract, Freeze, Init, Insert, Remove, Rename, Replace, Unfreeze
from modelcli.live.describe import describe
from modelcli.live.scripting.model_edits import KEEP_WEIGHTS, fills, new_module
from modelcli.live.scripting.page import InexpressibleError, Page, loop, mapping, quoted
from modelcli.live.sources import named_tensors
from modelcli.live.surgery.initialising import DEFAULT, scheme_name


def statements(page: Page, edit: Edit, before: nn.Module, after: nn.Module, seed: int | None) -> list[str]:
    """What one edit does; `before` and `after` are the trees around it. Raises InexpressibleError."""
    blueprint = describe(before)
    match edit:
        case Rename():
            renamed = selectors.renaming(edit.old, edit.new, blueprint)
            names = {name: renamed(name) for name in before.state_dict()}
            return _renamed({name: name if new is None else new for name, new in names.items()})
        case Extract():
            (path,) = selectors.select_modules(blueprint, [edit.path])
            prefix = quoted(f"{path}.")
            pairs = f"key.removeprefix({prefix}): value for key, value in state.items()"
            return [f"state = {{{pairs} if key.startswith({prefix})}}"]
        case Remove():
            return _removed(edit, blueprint, list(before.state_dict()))
        case Replace():
            paths = selectors.select_modules(blueprint, edit.targets, without=edit.without)
            gone = [name for path in paths for name in before.state_dict() if name.startswith(f"{path}.")]
            if edit.keep_weights:
                page.helpers.setdefault(KEEP_WEIGHTS)
                left = _left(gone, after)
                return [*_added(page, edit, paths, after, seed), *(loop("key", left, "del state[key]") if left else [])]
            return [*loop("key", gone, "del state[key]"), *_added(page, edit, paths, after, seed)]
        case Insert():
            above, _, position = edit.path.rpartition(".")
            (holder,) = selectors.select_modules(blueprint, [above or "."])
            path = joined(holder, position)
            moved = _moved(list(before.state_dict()), holder, lambda number: number + (number >= int(position)))
            return [*moved, *_added(page, edit, [path], after, seed)]
        case Add():
            path = next(m.path for m in describe(after).modules if m.path not in blueprint.by_path)
            return _added(page, edit, [path], after, seed)
        case Freeze() | Unfreeze():
            return ["# a state dict holds no requires_grad: nothing to do"]
        case Cast():
            now = describe(after).by_name
            names_of = [t.name for t in blueprint.tensors if now[t.name].dtype != t.dtype]
            return loop("key", names_of, f"state[key] = state[key].to(torch.{edit.dtype})")
        case Init() if scheme_name(edit.scheme) != DEFAULT:
            chosen = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
            chosen = [name for name in chosen if blueprint.by_name[name].tied_to not in chosen]
            page.imports.add("from torch.nn import init")
            seeded = [] if seed is None else [f"torch.manual_seed({seed})"]
            return seeded + fills(page, chosen, edit, lambda name: f"state[{quoted(name)}]", "state[name]")
    raise InexpressibleError(f"{edit.name} on a file that does not say its architecture has no plain statements")


def _removed(edit: Remove, blueprint: Blueprint, names: Sequence[str]) -> list[str]:
    """The keys that go, and new names for those that move down."""
    paths, lines = [], []
    for target in edit.targets:
        selector = selectors.parse(target)
        paths += sorted(
            selectors.matched_modules(selector, blueprint) or selectors.matched_tensors(selector, blueprint)
        )
    gone = [name for name in names if any(path in paths for path in ancestors(name))]
    lines += loop("key", gone, "del state[key]")
    if edit.renumber:
        left = [name for name in names if name not in gone]
        for holder in dict.fromkeys(map(parent_of, paths)):
            numbers = [int(path.rpartition(".")[2]) for path in paths if parent_of(path) == holder]
            lines += _moved(left, holder, lambda n, numbers=numbers: n - sum(g < n for g in numbers))  # type: ignore[misc]
    return lines


def _moved(names: Sequence[str], holder: str, shift: Callable[[int], int]) -> list[str]:
    """New names for the keys below numbered children of a module."""
    prefix, new_names = joined(holder, ""), {}
    for name in names:
        number, dot, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and dot and number.isdigit():
            new_names[name] = f"{prefix}{shift(int(number))}.{rest}"
    if all(name == new for name, new in new_names.items()):
        return []
    return _renamed({name: new_names.get(name, name) for name in names})


def _left(gone: Sequence[str], after: nn.Module) -> list[str]:
    """The keys that are in no new module either."""
    there = after.state_dict()
    return [name for name in gone if name not in there]


def _added(
    page: Page, edit: Replace | Add | Insert, paths: Sequence[str], after: nn.Module, seed: int | None
) -> list[str]:
    new = after.get_submodule(paths[0])
    lines = [f"torch.manual_seed({seed})"] if seed is not None and named_tensors(new) else []
    made = {id(after.get_submodule(path)): path for path in reversed(paths)}
    if len(made) != 1:
        raise InexpressibleError("one module would have to be several")
    lines.append(f"new = {new_module(page, edit, new)}")
    for path in paths:
        prefix = f"{path}."
        if isinstance(edit, Replace) and edit.keep_weights:
            below = f"key.removeprefix({quoted(prefix)}): value for key, value in state.items()"
            below = f"{{{below} if key.startswith({quoted(prefix)})}}"
            lines.append(f"keep_weights({below}, new)")
        lines.append(f"state |= {{{quoted(prefix)} + key: value for key, value in new.state_dict().items()}}")
    return lines


def _renamed(names: Mapping[str, str]) -> list[str]:
    """The keys under other names: by their prefix where that tells it, else one by one."""
    moved = {name: new for name, new in names.items() if name != new}
    name, new = next(iter(moved.items()))
    while name and new and name.rpartition(".")[2] == new.rpartition(".")[2]:
        name, new = parent_of(name), parent_of(new)
    old_prefix, new_prefix = (f"{path}." if path else "" for path in (name, new))

    def by_prefix(key: str) -> str:
        return new_prefix + key.removeprefix(old_prefix) if key.startswith(old_prefix) else key

    if all(by_prefix(key) == wanted for key, wanted in names.items()):
        return [_by_prefix(old_prefix, new_prefix, all(key.startswith(old_prefix) for key in names))]
    return [
        *mapping("names", moved.items()),
        "state = {names.get(key, key): value for key, value in state.items()}",
    ]


def _by_prefix(old: str, new: str, everywhere: bool) -> str:
    key = f"key.removeprefix({quoted(old)})" if old else "key"
    key = f"{quoted(new)} + {key}" if new else key
    # removeprefix alone leaves other keys as they are.
    condition = "" if everywhere or not new else f" if key.startswith({quoted(old)}) else key"
    return f"state = {{{key}{condition}: value for key, value in state.items()}}"


__all__ = ["statements"]
