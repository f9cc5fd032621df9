"""rename: tensor keys of a bare checkpoint under other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modelcli.checkpoints import CompositeEntry
from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.rename import Rename
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.live.build import Bare
from modelcli.live.describe import describe
from modelcli.live.loading import MAX_MODULE_DEPTH, bare_tree
from modelcli.live.script.state import State
from modelcli.live.script.step import Step
from modelcli.live.sources import is_lazy
from modelcli.live.surgery.core import blueprint_of
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import ancestors, parent_of

#: Changes that fill a screen; more are told as one.
_ROWS = 20


def carry_out(module: nn.Module, edit: Rename, context: Context) -> Applied[nn.Module]:
    """Give a new tree with the keys renamed; the old one stays as it is."""
    blueprint = blueprint_of(module, context)
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    new_names = names_given(edit, blueprint, state)
    if all(new is None for new in new_names.values()):
        selector = selectors.parse(edit.old)
        if selectors.matched_modules(selector, blueprint):
            old, new = (_all_below(name.removeprefix(".")) for name in (edit.old, edit.new))
            raise RequestError(
                f"{edit.old!r} is a module, and no key", f"rename {quoted(old)} {quoted(new)} renames all its keys"
            )
        raise selectors.no_match(selector, blueprint, "tensors")
    names = {name: name if new is None else new for name, new in new_names.items()}
    moved = [name for name, new in names.items() if new != name]
    if not moved:
        raise RequestError(f"rename {edit.old} {edit.new} gives every key the name that it has")
    _check(names, moved)
    if not isinstance(module, Bare):
        raise RequestError(
            f"{type(module).__name__} cannot load a state dict where {moved[0]} is called {names[moved[0]]}",
            "--bare-keys renames the keys of a file whatever its record says, which does not go with them; "
            "in a model, replace, add and extract change where modules are",
        )
    tree = bare_tree({names[name]: value for name, value in state.items()})
    _keep_origins(module, tree, names)
    changes = _changes(edit, state, names, moved)
    return Applied(tree, [replace(changes[0], resolved=(str(edit),)), *changes[1:]], inputs=context.inputs)


def names_given(edit: Rename, blueprint: Blueprint, state: Mapping[str, Any]) -> dict[str, str | None]:
    """The new name of each key of a state dict; None for one that is not meant."""
    renamed = selectors.renaming(edit.old, edit.new, blueprint)
    return {
        name: None if name != edit.old and _is_beside(name, value) else renamed(name) for name, value in state.items()
    }


def _is_beside(name: str, value: Any) -> bool:
    """Whether an entry of a flat checkpoint is no part of the model: `epoch` beside the tensors.

    It is renamed by its own name, and no pattern means it.
    """
    is_tensor = isinstance(value, torch.Tensor | CompositeEntry)
    return not is_tensor and "." not in name and not name.endswith("_extra_state")


def _check(names: Mapping[str, str], moved: Sequence[str]) -> None:
    """Refuse new names that are none, that two keys would have, or that one would have and a module as well."""
    olds: dict[str, str] = {}
    for name, new in names.items():
        if not new:
            raise RequestError(f"{name} would have no name left")
        if new.count(".") > MAX_MODULE_DEPTH:
            raise RequestError(f"{name} would be nested deeper than {MAX_MODULE_DEPTH}: {new[:60]}...")
        if new in olds:
            raise RequestError(
                f"{olds[new]} and {name} would both be called {new}",
                "narrow the old name, or keep what tells them apart",
            )
        olds[new] = name
    changed = set(moved)
    for new, name in olds.items():
        for above in ancestors(parent_of(new)):
            if above in olds and (name in changed or olds[above] in changed) and not _lies_below(name, olds[above]):
                raise RequestError(
                    f"{olds[above]} would be called {above}, and {name} {new}: "
                    f"{above} cannot be a tensor and a module at once"
                )


def _lies_below(name: str, other: str) -> bool:
    """Whether the file itself has keys below that of a tensor, as bitsandbytes writes `w.weight.absmax`."""
    return other in ancestors(parent_of(name))


def _keep_origins(before: nn.Module, after: Bare, names: Mapping[str, str]) -> None:
    """Tell the modules of the new tree which ones they were, as far as the names of their tensors show."""
    old_modules, new_modules = dict(before.named_modules(remove_duplicate=False)), dict(after.named_modules())
    found: dict[str, nn.Module] = {}
    for name, new in names.items():
        for path, new_path in _places(name, new):  # where they differ, the first tensor decides
            found.setdefault(new_path, old_modules[path])
    for path, old in found.items():
        renamed = new_modules[path]
        assert isinstance(renamed, Bare)
        renamed.origin = old.origin if isinstance(old, Bare) else None
        renamed.version = old.version if isinstance(old, Bare) else old._version


def _places(name: str, new: str) -> list[tuple[str, str]]:
    """The modules above a tensor under its old and its new name, as long as both names end alike."""
    if parent_of(name) == parent_of(new):
        return [(path, path) for path in ancestors(parent_of(name))]
    places = []
    while name and new and name.rpartition(".")[2] == new.rpartition(".")[2]:
        name, new = parent_of(name), parent_of(new)
        places.append((name, new))
    return places


def _changes(edit: Rename, state: Mapping[str, Any], names: Mapping[str, str], moved: Sequence[str]) -> list[Change]:
    """A row for each module that has another place, one for each key that moves alone, or one for all of them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in moved:
        places = _places(name, names[name]) if parent_of(name) != parent_of(names[name]) else []
        groups.setdefault(places[-1] if places else (name, names[name]), []).append(name)
    if len(groups) > _ROWS:
        return [_change("", edit.old, edit.new, moved, state)]
    changes = []
    for (old, new), below in groups.items():
        if len(below) == 1:
            changes.append(_change(parent_of(below[0]), below[0], names[below[0]], below, state))
        else:
            changes.append(_change(old, _all_below(old), _all_below(new), below, state))
    return changes


def _all_below(path: str) -> str:
    """The pattern for all keys of a module."""
    return f"{path}.**" if path else "**"


def _change(path: str, before: str, after: str, names: Sequence[str], state: Mapping[str, Any]) -> Change:
    """`names` are the old names of the keys that the change is of."""
    own = {id(state[name]): state[name] for name in names if isinstance(state[name], nn.Parameter)}
    size = sum(tensor.numel() for tensor in own.values() if not is_lazy(tensor))
    return Change(path, "rename", before, after if len(names) == 1 else f"{after} ({len(names)} keys)", size, size)


# --- scripts ---------------------------------------------------------------------------------------------------------


def state_dict_script_lines(edit: Rename, step: Step, state: State) -> list[str]:
    names = names_given(edit, describe(step.before), step.before.state_dict())
    return state.rename({name: name if new is None else new for name, new in names.items()})
