"""What a training checkpoint holds of the same model beside its state dict: optimizers, further state dicts."""

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

#: How deep in a checkpoint an optimizer's state dict is looked for: Lightning has lists of them.
_DEPTH = 3
#: What has more values than this is no dict of a training loop's own.
_MOST = 1_000


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter as an optimizer knows it: `identity` is another one once an edit has put another in its place.

    `shape` is None where it has none yet.
    """

    identity: Hashable
    shape: Shape | None = field(default=None, compare=False)


def unfit(tree: Any, before: Mapping[str, Held], after: Mapping[str, Held]) -> list[str]:
    """A line for each optimizer in a checkpoint whose state no longer fits the model's parameters.

    `tree` is the checkpoint as inert values. `before` are the parameters that the model had when it was opened, in
    their order, and `after` those that it has.

    `torch.optim` keeps its state by the position of a parameter in its `param_groups`, `model.parameters()` as a rule;
    other programs by name. Which parameters an optimizer of some of them was made for is told by shapes alone.
    """
    told = []
    for name, state, groups in _optimizers(tree):
        ids = [entry for group in groups for entry in _parameters(group)]
        if any(isinstance(entry, str) for entry in ids):
            wrong = [entry for entry in ids if isinstance(entry, str) and after.get(entry) != before.get(entry)]
        elif len(ids) != len(before):
            if changed := _perhaps_its_own(state, before, after):
                told.append(
                    f"{name} holds state for {counted(len(ids), 'parameter')}, and the model had {len(before)}: "
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
            told.append(f"the state in {name} no longer fits {listed(wrong, 4)}: make the optimizer anew")
    return told


def _perhaps_its_own(state: Mapping[Any, Any], before: Mapping[str, Held], after: Mapping[str, Held]) -> list[str]:
    """The parameters that are others now, and have a shape that an optimizer of some of them has state of."""
    shapes = {shape for entry in state.values() if isinstance(entry, dict) for shape in _shapes(entry)}
    return [
        own
        for own, parameter in before.items()
        if after.get(own) != parameter and (parameter.shape is None or parameter.shape in shapes)
    ]


def _shapes(entry: Mapping[Any, Any]) -> Iterator[tuple[int, ...]]:
    """The shapes of the tensors in the state of one parameter; those without a dimension are figures: a step."""
    for value in entry.values():
        if isinstance(value, TensorEntry | CompositeEntry) and value.shape:
            yield tuple(value.shape)


def renamed(opened: Mapping[str, Hashable], now: Mapping[str, Hashable]) -> set[str]:
    """The names of tensors that were there under others when the model was opened, and have those no more.

    `opened` and `now` have what tells one tensor from another, under every name that it had, and has.
    """
    gone = {tensor for name, tensor in opened.items() if name not in now}
    return {name for name, tensor in now.items() if name not in opened and tensor in gone}


def other_copies(
    contents: Contents, after: Blueprint, *, unwrapping: Unwrapping, changed: bool, renamed: Collection[str]
) -> list[str]:
    """A line for each further state dict of the same model in a checkpoint, such as a mean of its weights.

    `unwrapping` makes the keys of the file those of the model, and `changed` says that numbers may be others where
    shapes are not. `renamed` are new names of what the file has under others, which stand for both.
    """
    was = {unwrapping.key(name): entry.shape for name, entry in contents.tensors.items()}
    now = {tensor.name: tensor.shape for tensor in after.tensors if tensor.persistent}
    wrong = [name for name in {**was, **now} if was.get(name) != now.get(name) and name not in renamed]
    if not (wrong or changed):
        return []
    told = []
    for path in _copies(contents.tree, contents.key or (), set(was)):
        where = f"in {'.'.join(path)}" if path else "at the top of the file"
        unfit = f", and no longer fits {listed(wrong, 4)}" if wrong else ""
        edits = f": --key {quoted('.'.join(path))} edits that one" if path else ""
        told.append(f"the state dict {where} is as it was{unfit}{edits}")
    return told


def _copies(
    tree: Any, own: Sequence[str | int], names: Collection[str], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Where dicts stand that have tensors under at least half of these names, a wrapper's prefix before them or not."""
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
    """Every optimizer's state dict in a checkpoint: where it is, its state, its groups."""
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
