"""From a pickle's inert values to what a checkpoint holds: the tensors of its state dict, and all that is beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelcli.checkpoints import limits, record_reading
from modelcli.checkpoints import record as records
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.torch_pickle import (
    composite_tensors,
    deepspeed,
    nested_tensors,
    pickled_modules,
    pickles,
    state_dicts,
)
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef
from modelcli.model.tensors import Kind
from modelcli.wording import listed


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
    if whole is None and any(isinstance(item, Opaque) and state_dicts.is_sharded(item) for item in found.values()):
        raise state_dicts.part_of_a_rank(path, pickled) or state_dicts.nothing_to_show(path, pickled)
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    extras: dict[str, Any] = {}
    known: dict[int, CompositeEntry] = {}  # one tensor may stand under several names
    limits.check_names(state_dict, str(path))
    for name, item in state_dict.items():
        if isinstance(item, TensorEntry):
            tensors[name] = item
        elif composite_tensors.makes_tensor(item):
            if id(item) not in known:
                known[id(item)] = composite_tensors.entry_of(item, f"{path}: {name}", pickled.budget)
            tensors[name] = known[id(item)]
        else:
            extras[name] = item
    within, beyond = nested_tensors.tensors_within(extras, state_dict, str(path), pickled.budget)
    unseen = [name for name, item in extras.items() if composite_tensors.may_be_tensor(item)]
    beyond = [name for name in beyond if name not in unseen]
    left_out = [name for name in state_dicts.left_out_by_guess(pickled.value, keys, key) if name not in state_dict]
    attributes = dict.fromkeys(
        name for name, value in pickled.attributes if nested_tensors.may_hold_tensors(value, pickled.budget)
    )
    told = _told_of(unseen, beyond, tuple(attributes))
    state = state_dict.state if isinstance(state_dict, OrderedDict) else None
    of_the_dict = [
        name for name, value in (state or {}).items() if nested_tensors.may_hold_tensors(value, pickled.budget)
    ]
    metadata = state.get("_metadata") if isinstance(state, dict) else None
    if not isinstance(metadata, dict):
        metadata = {}
    # Where the two copies of the record differ, the one in the zip archive wins.
    recorded = record_reading.record_in((record_text, metadata.get(records.METADATA_KEY)), path)
    contents = Contents(
        path=path,
        format="pth",
        tensors=tensors,
        extras=extras,
        metadata={name: item for name, item in metadata.items() if name != records.METADATA_KEY},
        record=recorded.record,
        tree=pickled.value if keys else None,
        key=keys or None,
        foreign=pickled.foreign,
        notes=(*notes, *recorded.notes, *chosen, *told, *(() if whole is None else whole.notes)),
        types={} if whole is None else whole.types,
        kinds=_kinds_of_scales(tensors) if whole is None else whole.kinds,
        order=tuple(state_dict) if extras else (),
        inner=within,
        unseen=(*unseen, *beyond, *left_out),
        hidden=(
            *(f"the attribute {name!r} of a tensor" for name in attributes),
            *(f"the attribute {name!r:.40} of the state dict" for name in of_the_dict),
            *(() if whole is None else whole.hidden),
        ),
    )
    return recorded.completed(contents)


def _told_of(unseen: Sequence[str], beyond: Sequence[str], attributes: Sequence[str]) -> Iterator[str]:
    """What is to be told of tensors that have no row."""
    if unseen:
        made = "made by calls that are not followed here, and cannot be looked at"
        yield f"{listed(unseen, 4)} {_is_or_are(unseen)} {made}"
    if beyond:
        yield (
            f"{listed(beyond, 4)} hold{'s' if len(beyond) == 1 else ''} tensors that have no row of their own, or "
            "objects that only running code could load: the totals leave them out"
        )
    if attributes:
        yield f"tensors have attributes with tensors in them ({listed(attributes, 4)}), which no state dict loads"


def _is_or_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _kinds_of_scales(tensors: Mapping[str, TensorEntry | CompositeEntry]) -> dict[str, Kind]:
    """The scales of what quantized modules give, each beside its zero point: torch has no parameters for them."""
    ends = [name for name, entry in tensors.items() if name.endswith("zero_point") and not entry.shape]
    scales = (f"{name.removesuffix('zero_point')}scale" for name in ends)
    return {name: "buffer" for name in scales if name in tensors and not tensors[name].shape}


#: What nothing lies in. As a tuple that is made once: a file may have 100,000 of them.
_LEAVES = (TensorEntry, str, int, float, bytes, type(None), Global, StorageRef)


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
            stack.append((depth + 1, within(value)))
            break
        else:
            stack.pop()


def within(value: Any) -> Iterator[Any]:
    """What lies directly in a value."""
    match value:
        case dict():
            yield from value.keys()
            yield from value.values()
            if isinstance(value, OrderedDict):
                yield value.state
        case list() | tuple():
            yield from value
        case Opaque():
            yield from (value.call, value.args, value.state, *value.appended)
            for pair in value.items:
                yield from pair
