"""Notes on the other parts of a training checkpoint that belong to the edited model: optimizers, other state dicts."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelcli.checkpoints import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.language.quoting import quoted
from modelcli.model.blueprint import Blueprint
from modelcli.model.tensors import Shape
from modelcli.model.wrapper_prefixes import Unwrapping
from modelcli.wording import counted, listed

#: How deep in a checkpoint to search for an optimizer's state dict; Lightning has lists of them.
_DEPTH = 3
#: A dict with more values than this is not searched; training loops' own dicts are smaller.
_MOST = 1_000


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter of the model. If an edit replaces the parameter, its `identity` changes.

    `shape` is None for a lazy parameter.
    """

    identity: Hashable
    shape: Shape | None = field(default=None, compare=False)


def outdated_optimizer_notes(tree: Any, before: Mapping[str, Held], after: Mapping[str, Held]) -> list[str]:
    """Return a note for each optimizer in a checkpoint whose state no longer fits the model's parameters.

    `torch.optim` stores its state by the position of a parameter in `param_groups`, usually that in
    `model.parameters()`; other programs store it by name. For an optimizer of only some parameters, shapes are the only
    evidence for which ones.

    Args:
        tree: the checkpoint's contents.
        before: the parameters of the model when it was opened, in order.
        after: its parameters now.
    """
    notes = []
    for name, state, groups in _optimizers(tree):
        ids = [entry for group in groups for entry in _parameters(group)]
        if any(isinstance(entry, str) for entry in ids):
            wrong = [entry for entry in ids if isinstance(entry, str) and after.get(entry) != before.get(entry)]
        elif len(ids) != len(before):
            if changed := _perhaps_its_own(state, before, after):
                notes.append(
                    f"{name} has state for {counted(len(ids), 'parameter')}, but the model had {len(before)}: "
                    f"whether it still fits {listed(changed, 4)} is not known"
                )
            continue
        else:
            now = list(after.values())
            pairs = enumerate(before.items())
            wrong = [own for index, (own, p) in pairs if index >= len(now) or now[index] != p]
            if not wrong and len(now) > len(before):
                wrong = list(after)[len(before) :]
        if wrong and state:
            notes.append(f"the state in {name} no longer fits {listed(wrong, 4)}: create the optimizer again")
    return notes


def _perhaps_its_own(state: Mapping[Any, Any], before: Mapping[str, Held], after: Mapping[str, Held]) -> list[str]:
    """Return the parameters that have been replaced and whose shape occurs in the optimizer's state."""
    shapes = {shape for entry in state.values() if isinstance(entry, dict) for shape in _shapes(entry)}
    return [
        own
        for own, parameter in before.items()
        if after.get(own) != parameter and (parameter.shape is None or parameter.shape in shapes)
    ]


def _shapes(entry: Mapping[Any, Any]) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of the tensors in the state of one parameter, without scalars such as the step."""
    for value in entry.values():
        if isinstance(value, TensorEntry | CompositeEntry) and value.shape:
            yield tuple(value.shape)


def renamed(opened: Mapping[str, Hashable], now: Mapping[str, Hashable]) -> set[str]:
    """Return the new names of tensors that edits have renamed since the model was opened.

    `opened` and `now` map every name, then and now, to a value that identifies the tensor.
    """
    gone = {tensor for name, tensor in opened.items() if name not in now}
    return {name for name, tensor in now.items() if name not in opened and tensor in gone}


def other_state_dict_notes(
    contents: Contents, after: Blueprint, *, unwrapping: Unwrapping, changed: bool, renamed: Collection[str]
) -> list[str]:
    """Return a note for each other state dict of the same model in a checkpoint, such as a moving average.

    Args:
        contents: the checkpoint.
        after: the edited model.
        unwrapping: the change that turns the file's keys into the model's.
        changed: whether values may have changed where shapes have not.
        renamed: the new names of renamed tensors, which count as unchanged.
    """
    was = {unwrapping.key(name): entry.shape for name, entry in contents.tensors.items()}
    now = {tensor.name: tensor.shape for tensor in after.tensors if tensor.persistent}
    wrong = [name for name in {**was, **now} if was.get(name) != now.get(name) and name not in renamed]
    if not (wrong or changed):
        return []
    notes = []
    for path in _copies(contents.tree, contents.key or (), set(was)):
        where = f"in {'.'.join(path)}" if path else "at the top level of the file"
        misfit = f" and no longer fits {listed(wrong, 4)}" if wrong else ""
        edits = f": --key {quoted('.'.join(path))} edits it" if path else ""
        notes.append(f"the state dict {where} is unchanged{misfit}{edits}")
    return notes


def _copies(
    tree: Any, own: Sequence[str | int], names: Collection[str], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield the paths of dicts with tensors under at least half of `names`, with or without a wrapper's prefix."""
    if not isinstance(tree, dict) or path == tuple(own):
        return
    keys = [key for key, value in tree.items() if isinstance(key, str) and isinstance(value, TensorEntry)]
    known = {*names, *(name.partition(".")[2] for name in names)}
    if names and 2 * sum(key in known or key.partition(".")[2] in known for key in keys) >= len(names):
        yield path
    elif len(path) < _DEPTH and len(tree) < _MOST:
        for key, value in tree.items():
            if isinstance(key, str):
                yield from _copies(value, own, names, (*path, key))


def _optimizers(tree: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any, Sequence[Any]]]:
    """Yield the path, the state and the parameter groups of each optimizer's state dict in a checkpoint."""
    if isinstance(tree, dict):
        state, groups = tree.get("state"), tree.get("param_groups")
        if isinstance(state, dict) and isinstance(groups, list):
            yield path or "the file", state, groups
            return
        items: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return
    if depth < _DEPTH and len(items) < _MOST:
        for key, value in items:
            yield from _optimizers(value, f"{path}[{key!r}]" if path else str(key), depth + 1)


def _parameters(group: Any) -> list[Any]:
    params = group.get("params") if isinstance(group, dict) else None
    return params if isinstance(params, list) else []
