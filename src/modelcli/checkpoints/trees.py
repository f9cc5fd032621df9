"""From a pickle's inert values to what a checkpoint holds: the tensors of its state dict, and all that is beside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modelcli import record as records
from modelcli.blueprints import listed
from modelcli.checkpoints import carried, composites, deepspeed, limits, pickled_modules, pickles, state_dicts
from modelcli.checkpoints.contents import CompositeEntry, Contents, TensorEntry


def contents_of(
    path: Path,
    pickled: pickles.Pickle,
    key: str | None,
    record_text: str | None = None,
    notes: tuple[str, ...] = (),
) -> Contents:
    """What a file of `torch.save` holds."""
    _check_nesting(path, pickled.value)
    notes = (*notes, *deepspeed.notes_of(path, pickled.value))
    keys, found, chosen = state_dicts.find(path, pickled, key)
    whole = None if isinstance(found, dict) else pickled_modules.read(path, found, pickled.budget)
    state_dict = found if whole is None else whole.tensors
    if whole is not None and not state_dict:
        raise state_dicts.nothing_to_show(path, pickled)
    if whole is None and any(
        isinstance(item, pickles.Opaque) and state_dicts.is_sharded(item) for item in found.values()
    ):
        raise state_dicts.part_of_a_rank(path, pickled) or state_dicts.nothing_to_show(path, pickled)
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    extras: dict[str, Any] = {}
    known: dict[int, CompositeEntry] = {}  # one tensor may stand under several names
    limits.check_names(state_dict, str(path))
    for name, item in state_dict.items():
        if isinstance(item, TensorEntry):
            tensors[name] = item
        elif composites.makes_tensor(item):
            if id(item) not in known:
                known[id(item)] = composites.entry_of(item, f"{path}: {name}", pickled.budget)
            tensors[name] = known[id(item)]
        else:
            extras[name] = item
    unseen = tuple(name for name, item in extras.items() if composites.may_be_tensor(item))
    seen_through = {name: item for name, item in extras.items() if not composites.may_be_tensor(item)}
    hidden = tuple(name for name, item in seen_through.items() if _holds_tensors(item, pickled.budget))
    attributes = dict.fromkeys(name for name, value in pickled.attributes if _holds_tensors(value, pickled.budget))
    told = _told_of(unseen, hidden, tuple(attributes))
    state = state_dict.state if isinstance(state_dict, pickles.OrderedDict) else None
    metadata = state.get("_metadata") if isinstance(state, dict) else None
    if not isinstance(metadata, dict):
        metadata = {}
    # Where the two copies of the record differ, the one in the zip archive wins.
    record, wrong = carried.record_in((record_text, metadata.get(records.METADATA_KEY)), path)
    return Contents(
        path=path,
        format="pth",
        tensors=tensors,
        extras=extras,
        metadata={name: item for name, item in metadata.items() if name != records.METADATA_KEY},
        record=record,
        tree=pickled.value if keys else None,
        key=keys or None,
        foreign=pickled.foreign,
        notes=(*notes, *wrong, *chosen, *told, *(() if whole is None else whole.notes)),
        types={} if whole is None else whole.types,
        kinds={} if whole is None else whole.kinds,
        order=tuple(state_dict) if extras else (),
        unseen=unseen,
        hidden=(*hidden, *(f"the attribute {name!r} of a tensor" for name in attributes)),
    )


def _told_of(unseen: Sequence[str], hidden: Sequence[str], attributes: Sequence[str]) -> Iterator[str]:
    """What is to be told of tensors that have no row."""
    if unseen:
        yield f"{listed(unseen, 4)} {_is_or_are(unseen)} made by calls that are not followed here: no row shows what of"
    if hidden:
        yield f"{listed(hidden, 4)} hold{'s' if len(hidden) == 1 else ''} tensors that have no row of their own"
    if attributes:
        yield f"tensors have attributes with tensors in them ({listed(attributes, 4)}), which no state dict loads"


def _is_or_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _holds_tensors(value: Any, budget: limits.Budget) -> bool:
    """Whether tensors lie in a value: weights that a quantized module packs, an object that only code could make.

    Many entries may have one large value in common: each look through it is paid for.
    """
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, TensorEntry) or composites.may_be_tensor(item):
            return True
        if not isinstance(item, _LEAVES) and id(item) not in seen:
            seen.add(id(item))
            within = list(_within(item))
            budget.spend(len(within))
            stack += within
    return False


#: What nothing lies in. As a tuple that is made once: a file may have 100,000 of them.
_LEAVES = (TensorEntry, str, int, float, bytes, type(None), pickles.Global, pickles.StorageRef)


def _check_nesting(path: Path, tree: Any) -> None:
    """Raise FileFormatError where values lie in one another deeper than the limit. Each is looked at once."""
    deepest = limits.NESTING.value
    seen: set[int] = set()
    stack = [(1, iter((tree,)))]
    while stack:
        depth, values = stack[-1]
        for value in values:
            if isinstance(value, _LEAVES) or value == () or id(value) in seen:
                continue
            seen.add(id(value))
            if depth > deepest:
                raise limits.NESTING.exceeded(f"{path}: the tree of its values", f"more than {deepest:,} levels")
            stack.append((depth + 1, _within(value)))
            break
        else:
            stack.pop()


def _within(value: Any) -> Iterator[Any]:
    """What lies directly in a value."""
    match value:
        case dict():
            yield from value.keys()
            yield from value.values()
            if isinstance(value, pickles.OrderedDict):
                yield value.state
        case list() | tuple():
            yield from value
        case pickles.Opaque():
            yield from (value.call, value.args, value.state, *value.appended)
            for pair in value.items:
                yield from pair
