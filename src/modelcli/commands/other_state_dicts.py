"""The other state dicts of the same model in a training checkpoint, such as a moving average of its values."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from modelcli.checkpoints import Contents
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.record import METADATA_KEY
from modelcli.checkpoints.torch_pickle.inert_values import OrderedDict
from modelcli.language.quoting import quoted
from modelcli.model import wrapper_prefixes
from modelcli.model.blueprint import Blueprint
from modelcli.model.wrapper_prefixes import Unwrapping
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.commands.editable import Editable
    from modelcli.commands.write import WriteRequest

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
    contents: Contents,
    after: Blueprint,
    *,
    unwrapping: Unwrapping,
    changed: bool,
    renamed: Collection[str],
    edited: Collection[int],
) -> list[str]:
    """Return a note for each other state dict of the same model in a checkpoint, such as a moving average.

    Args:
        contents: the checkpoint.
        after: the edited model.
        unwrapping: the change that turns the file's keys into the model's.
        changed: whether values may have changed where shapes have not.
        renamed: the new names of renamed tensors, which count as unchanged.
        edited: the `id` of each of them that got the same edits.
    """
    was = {unwrapping.key(name): entry.shape for name, entry in contents.tensors.items()}
    now = {tensor.name: tensor.shape for tensor in after.tensors if tensor.persistent}
    wrong = [name for name in {**was, **now} if was.get(name) != now.get(name) and name not in renamed]
    notes = []
    for path, value in _copies(contents.tree, contents.key or (), set(was)):
        where = f"in {'.'.join(path)}" if path else "at the top level of the file"
        if id(value) in edited:
            notes.append(f"the state dict {where} has the same edits")
        elif wrong or changed:
            misfit = f" and no longer fits {listed(wrong, 4)}" if wrong else ""
            edits = f": --key {quoted('.'.join(path))} edits it" if path else ""
            if edits and copy_of(contents, value) is not None:
                edits = f"{edits}, --also-ema edits both"
            notes.append(f"the state dict {where} is unchanged{misfit}{edits}")
    return notes


@dataclass(frozen=True)
class Copy:
    """A state dict with the keys and shapes of the model's, perhaps under the prefix of a wrapper.

    Attributes:
        value: the state dict.
        names: its key for each key of the model's state dict.
        prefix: what its keys have in front of the model's.
        removed: what the model's keys have in front of its.
        has_buffers: whether it has the model's buffers, not the parameters alone.
    """

    value: Mapping[str, Any]
    names: Mapping[str, str]
    prefix: str = ""
    removed: str = ""
    has_buffers: bool = True

    def key(self, name: str) -> str:
        """Return its key for a key of the model."""
        return self.prefix + name.removeprefix(self.removed)

    def path(self, path: str) -> str:
        """Return its path of a module for a path of the model."""
        return self.key(f"{path}." if path else "").removesuffix(".")

    def is_inside(self, path: str) -> bool:
        """Whether one of its paths is that of a module of the model, not of a wrapper around it."""
        return f"{path}.".startswith(self.prefix)

    def of_model(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return its metadata by the paths of the model."""
        return {
            (self.removed + f"{path}."[len(self.prefix) :]).removesuffix("."): item
            for path, item in metadata.items()
            if self.is_inside(path) and path != METADATA_KEY
        }


def copies_of(contents: Contents) -> list[Copy]:
    """Return the other state dicts in a checkpoint to which the edits of the model apply as they are."""
    found = (copy_of(contents, value) for path, value in _copies(contents.tree, contents.key or (), contents.tensors))
    return [copy for copy in found if copy is not None]


def trained_beside(contents: Contents) -> str | None:
    """Return where the model is whose average is edited: an optimizer in the file is that of the model.

    None if the edited state dict is no average by its name, or there is no copy of it that is none.
    """
    own = contents.key or ()
    if not _is_average(own):
        return None
    paths = (path for path, _ in _copies(contents.tree, own, contents.tensors))
    return next((".".join(path) for path in paths if path and not _is_average(path)), None)


def _is_average(path: Sequence[str | int]) -> bool:
    return any(word in str(step).lower() for step in path for word in ("ema", "averag", "swa"))


def copy_of(contents: Contents, value: Mapping[str, Any]) -> Copy | None:
    """Return a state dict as a copy of the model's; None if it has other keys or shapes.

    It may have single values besides, such as the number of averages. A moving average may have the parameters alone.
    """
    own = {name: entry.shape for name, entry in contents.tensors.items()}
    there = {name: entry.shape for name, entry in value.items() if isinstance(entry, TensorEntry)}
    buffers = {name for name, info in contents.infos().items() if info.kind == "buffer"}
    wrapped, wrapping = wrapper_prefixes.fit(there, own), wrapper_prefixes.fit(own, there)
    for prefix, removed in (("", ""), (wrapped.prefix, ""), ("", wrapping.prefix)):
        names = {name: prefix + name.removeprefix(removed) for name in own}
        absent = {name for name, key in names.items() if key not in there}
        if (absent and absent != buffers) or any(there[key] != own[n] for n, key in names.items() if n not in absent):
            continue
        others = there.keys() - set(names.values())
        if all(there[key] in ((), (1,)) for key in others):
            return Copy(value, {n: key for n, key in names.items() if n not in absent}, prefix, removed, not absent)
    return None


def edited(model: Editable, contents: Contents, copy: Copy, request: WriteRequest) -> Mapping[str, Any]:
    """Return a state dict with the edits of the model, as the tree of a checkpoint holds it.

    Args:
        model: the edited model.
        contents: the checkpoint that it was opened from.
        copy: the state dict.
        request: how the model is written.
    """
    assert request.out is not None
    value = copy.value
    state = value.state if isinstance(value, OrderedDict) else None
    metadata = state.get("_metadata") if isinstance(state, dict) else None
    twin = replace(
        contents,
        tensors={
            name: value[copy.names[name]] if name in copy.names else entry for name, entry in contents.tensors.items()
        },
        extras={name: value.get(copy.key(name), extra) for name, extra in contents.extras.items()},
        metadata=copy.of_model(metadata) if isinstance(metadata, dict) else contents.metadata,
    )
    same = model.edited_copy(twin)
    plan = same.plan(request.out, request.format, compact=request.compact, with_record=False)
    kinds = {info.name: info.kind for info in same.describe().tensors}
    entries = {
        copy.key(name): entry
        for name, entry in plan.entries.items()
        if copy.has_buffers or kinds.get(name) == "parameter"
    }
    used = {*copy.names.values(), *map(copy.key, contents.extras)}
    others = {name: item for name, item in value.items() if name not in used}
    found = others | entries if next(iter(value)) in others else entries | others
    if not isinstance(value, OrderedDict):
        return found
    made = OrderedDict(found)
    made.state = state
    if state is not None and isinstance(metadata, dict):
        outside = {path: item for path, item in metadata.items() if not copy.is_inside(path)}
        inside = {copy.path(path): item for path, item in plan.metadata.items()}
        made.state = dict(state)
        made.state["_metadata"] = OrderedDict(outside | inside)
    return made


def _copies(
    tree: Any, own: Sequence[str | int], names: Collection[str], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield the paths of dicts with tensors under at least half of `names`, with or without a wrapper's prefix."""
    if not isinstance(tree, dict) or path == tuple(own):
        return
    keys = [key for key, value in tree.items() if isinstance(key, str) and isinstance(value, TensorEntry)]
    known = {*names, *(name.partition(".")[2] for name in names)}
    if names and 2 * sum(key in known or key.partition(".")[2] in known for key in keys) >= len(names):
        yield path, tree
    elif len(path) < _DEPTH and len(tree) < _MOST:
        for key, value in tree.items():
            if isinstance(key, str):
                yield from _copies(value, own, names, (*path, key))
