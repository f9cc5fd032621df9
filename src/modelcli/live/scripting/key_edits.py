"""Edits of a bare checkpoint as statements on its state dict, which is called `state`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from modelcli.edits import Edit
from modelcli.edits.add import Add
from modelcli.edits.cast import Cast
from modelcli.edits.extract import Extract
from modelcli.edits.freeze import Freeze
from modelcli.edits.init import Init
from modelcli.edits.insert import Insert
from modelcli.edits.remove import Remove
from modelcli.edits.rename import Rename
from modelcli.edits.replace import Replace
from modelcli.edits.unfreeze import Unfreeze
from modelcli.language import selectors
from modelcli.live.describe import describe
from modelcli.live.scripting.model_edits import CAST_VIEWS, KEEP_WEIGHTS, fills, new_module
from modelcli.live.scripting.page import STATEMENTS, InexpressibleError, Page, call, deleted, loop, mapping, quoted
from modelcli.live.sources import named_tensors
from modelcli.live.surgery import rename as renaming
from modelcli.live.surgery.init import DEFAULT, scheme_name
from modelcli.live.surgery.storages import has_storage, key_of
from modelcli.model.blueprint import Blueprint
from modelcli.model.dtypes import FLOATING
from modelcli.model.paths import joined, lies_in, parent_of


class State:
    """What is known of `state` while the script is written.

    `names` are its keys in their order; `wanted` are those after the edit that is being told, as modelcli writes them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.wanted = self.names

    def delete(self, gone: Sequence[str], paths: Sequence[str] = ()) -> list[str]:
        """Take keys out; by their prefix where they are many and all those below `paths`."""
        below = [name for name in self.names if any(name.startswith(f"{path}.") for path in paths)]
        self.names = [name for name in self.names if name not in set(gone)]
        if len(gone) <= STATEMENTS or set(below) != set(gone):
            return deleted(gone)
        prefixes = [quoted(f"{path}.") for path in paths]
        prefix = prefixes[0] if len(prefixes) == 1 else f"({', '.join(prefixes)})"
        return [f"state = {{key: value for key, value in state.items() if not key.startswith({prefix})}}"]

    def rename(self, names: Mapping[str, str]) -> list[str]:
        """Give keys other names, in their places; `names` has all keys."""
        self.names = [names.get(name, name) for name in self.names]
        return _renamed(names)

    def put(self, prefix: str, own: Sequence[str], gone: Sequence[str] = ()) -> list[str]:
        """Put in the tensors of `new`, whose own names are given, in the place of keys that go."""
        if not own:
            return self.delete(gone) or ["# a module without tensors: nothing to do"]
        names = [prefix + name for name in own]
        pairs = f"{quoted(prefix)} + key: value for key, value in new.state_dict().items()"
        left = [name for name in gone if name not in names]
        if self._is_in_order([*(name for name in self.names if name not in left), *names]):
            deleted = self.delete(left, [prefix.removesuffix(".")])
            self.names = list(dict.fromkeys([*self.names, *names]))
            return [*deleted, f"state |= {{{pairs}}}"]
        deleted = self.delete([name for name in self.names if name in {*gone, *names}], [prefix.removesuffix(".")])
        behind = self.wanted[self.wanted.index(names[-1]) + 1 :]
        follower = next((name for name in behind if name in self.names), None)
        at = len(self.names) if follower is None else self.names.index(follower)
        self.names[at:at] = names
        if follower is None:
            return [*deleted, f"state |= {{{pairs}}}"]
        return [
            *deleted,
            f"at = list(state).index({quoted(follower)})",
            "items = list(state.items())",
            f"items[at:at] = {{{pairs}}}.items()",
            "state = dict(items)",
        ]

    def sort(self) -> list[str]:
        """Put the keys into the order that is wanted, where the edit has not done so."""
        if self._is_in_order(self.names):
            return []
        there = set(self.names)
        wanted = [name for name in self.wanted if name in there]
        self.names = [*(there - set(wanted)), *wanted]
        return loop("key", wanted, "state[key] = state.pop(key)")

    def _is_in_order(self, names: Iterable[str]) -> bool:
        """Whether keys, as often as they are set, are in the order that is wanted, as far as that is known yet."""
        names = list(dict.fromkeys(names))
        wanted = set(self.wanted)
        there = set(names)
        return [name for name in names if name in wanted] == [name for name in self.wanted if name in there]


def statements(
    page: Page, edit: Edit, before: nn.Module, after: nn.Module, seed: int | None, state: State
) -> list[str]:
    """What one edit does; `before` and `after` are the trees around it. Raises InexpressibleError."""
    return [*_statements(page, edit, before, after, seed, state), *state.sort()]


def _statements(
    page: Page, edit: Edit, before: nn.Module, after: nn.Module, seed: int | None, state: State
) -> list[str]:
    blueprint = describe(before)
    match edit:
        case Rename():
            names = renaming.names_given(edit, blueprint, before.state_dict())
            return state.rename({name: name if new is None else new for name, new in names.items()})
        case Extract():
            (path,) = selectors.select_modules(blueprint, [edit.path])
            prefix = f"{path}."
            state.names = [name.removeprefix(prefix) for name in state.names if name.startswith(prefix)]
            pairs = f"key.removeprefix({quoted(prefix)}): value for key, value in state.items()"
            return [f"state = {{{pairs} if key.startswith({quoted(prefix)})}}"]
        case Remove():
            return _removed(edit, blueprint, list(before.state_dict()), state)
        case Replace():
            paths = selectors.select_modules(blueprint, edit.targets, without=edit.without)
            return _replaced(page, edit, paths, list(before.state_dict()), after, seed, state)
        case Insert():
            above, _, position = edit.path.rpartition(".")
            (holder,) = selectors.select_modules(blueprint, [above or "."])
            moved = _moved(list(before.state_dict()), holder, lambda number: number + (number >= int(position)), state)
            path = joined(holder, position)
            return [*moved, *_made(page, edit, path, after, seed), *state.put(f"{path}.", _own(after, path))]
        case Add():
            path = next(m.path for m in describe(after).modules if m.path not in blueprint.by_path)
            return [*_made(page, edit, path, after, seed), *state.put(f"{path}.", _own(after, path))]
        case Freeze() | Unfreeze():
            return ["# a state dict holds no requires_grad: nothing to do"]
        case Cast():
            return _cast(page, edit, before, after)
        case Init() if scheme_name(edit.scheme) != DEFAULT:
            chosen = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
            chosen = [name for name in chosen if blueprint.by_name[name].tied_to not in chosen]
            page.imports.add("from torch.nn import init")
            seeded = [] if seed is None else [f"torch.manual_seed({seed})"]
            return seeded + fills(page, chosen, edit, lambda name: f"state[{quoted(name)}]", "state[name]")
    raise InexpressibleError(f"{edit.name} on a file that does not say its architecture has no plain statements")


# --- dtypes --------------------------------------------------------------------------------------------------------


def _cast(page: Page, edit: Cast, before: nn.Module, after: nn.Module) -> list[str]:
    """What converts tensors; those that share a storage together, so that they share one again."""
    now = describe(after).by_name
    tensors = named_tensors(before)
    changed = [t.name for t in describe(before).tensors if now[t.name].dtype != t.dtype]
    storages: dict[object, list[str]] = {}
    for name in changed:
        alone = not has_storage(tensors[name])
        storages.setdefault(name if alone else (key_of(tensors[name]), tensors[name].dtype), []).append(name)
    lines, dtype = [], f"torch.{edit.dtype}"
    for names in storages.values():
        if len(names) > 1:
            page.helpers.setdefault(CAST_VIEWS)
            lines += call("cast_views", [f"state[{quoted(name)}]" for name in names], dtype)
    rest = [name for names in storages.values() for name in names if len(names) == 1]
    if len(rest) <= STATEMENTS:
        return [*lines, *(f"state[{quoted(name)}] = state[{quoted(name)}].to({dtype})" for name in rest)]
    floating = (now[name].dtype for name in now if now[name].dtype in FLOATING)
    if all(map(torch.is_tensor, before.state_dict().values())) and all(found == edit.dtype for found in floating):
        value = f"value.to({dtype}) if value.is_floating_point() else value"
        return [*lines, f"state = {{key: {value} for key, value in state.items()}}"]
    return [*lines, *loop("key", rest, f"state[key] = state[key].to({dtype})")]


# --- keys ----------------------------------------------------------------------------------------------------------


def _removed(edit: Remove, blueprint: Blueprint, names: Sequence[str], state: State) -> list[str]:
    """The keys that go, and new names for those that move down."""
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
            lines += _moved(left, holder, lambda n, numbers=numbers: n - sum(g < n for g in numbers), state)  # type: ignore[misc]
    return lines


def _replaced(
    page: Page,
    edit: Replace,
    paths: Sequence[str],
    names: Sequence[str],
    after: nn.Module,
    seed: int | None,
    state: State,
) -> list[str]:
    """The new tensors, where the first of the old ones was."""
    if len({id(after.get_submodule(path)) for path in paths}) != 1:
        raise InexpressibleError("one module would have to be several")
    lines = _made(page, edit, paths[0], after, seed)
    for path in paths:
        prefix = f"{path}."
        if edit.keep_weights:
            page.helpers.setdefault(KEEP_WEIGHTS)
            below = f"key.removeprefix({quoted(prefix)}): value for key, value in state.items()"
            lines.append(f"keep_weights({{{below} if key.startswith({quoted(prefix)})}}, new)")
        lines += state.put(prefix, _own(after, path), [name for name in names if name.startswith(prefix)])
    return lines


def _own(after: nn.Module, path: str) -> list[str]:
    """The names that the tensors of a new module have in it."""
    return list(after.get_submodule(path).state_dict())


def _made(page: Page, edit: Replace | Add | Insert, path: str, after: nn.Module, seed: int | None) -> list[str]:
    """What makes `new`, where it has tensors."""
    new = after.get_submodule(path)
    if not new.state_dict():
        return []
    seeded = [f"torch.manual_seed({seed})"] if seed is not None and named_tensors(new) else []
    return [*seeded, f"new = {new_module(page, edit, new)}"]


def _number(name: str, holder: str) -> int:
    """The number of the child or tensor of a module that a key is, or lies below; -1 for none."""
    number = name.removeprefix(joined(holder, "")).partition(".")[0]
    return int(number) if number.isdigit() else -1


def _moved(names: Sequence[str], holder: str, shift: Callable[[int], int], state: State) -> list[str]:
    """New names for the keys below numbered children of a module."""
    prefix, new_names = joined(holder, ""), {}
    for name in names:
        if name.startswith(prefix) and (number := _number(name, holder)) >= 0:
            _, dot, rest = name.removeprefix(prefix).partition(".")
            new_names[name] = f"{prefix}{shift(number)}{dot}{rest}"
    if all(name == new for name, new in new_names.items()):
        return []
    return state.rename({name: new_names.get(name, name) for name in names})


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


__all__ = ["State", "statements"]
