"""The other state dicts of the same model in a training checkpoint, such as a moving average of its values."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

from modelcli.checkpoints import Contents
from modelcli.checkpoints.entries import TensorEntry
from modelcli.language.quoting import quoted
from modelcli.model.blueprint import Blueprint
from modelcli.model.wrapper_prefixes import Unwrapping
from modelcli.wording import listed

#: How deep in a checkpoint to search for them.
_DEPTH = 3
#: A dict with more values than this is not searched; training loops' own dicts are smaller.
_MOST = 1_000


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
