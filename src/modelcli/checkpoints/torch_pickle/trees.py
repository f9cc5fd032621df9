"""Turn the inert values of a pickle into the contents of a checkpoint: its state dict, and everything beside it."""

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
from modelcli.wording import brief_repr, listed


def contents_of(
    path: Path,
    pickled: pickles.Pickle,
    key: str | None,
    record_text: str | None = None,
    notes: tuple[str, ...] = (),
) -> Contents:
    """Return the contents of a file that `torch.save` wrote.

    Args:
        path: the file.
        pickled: its pickle.
        key: the state dict to take, as `--key` names it; None to find it.
        record_text: the record in the zip archive, if any.
        notes: the notes so far.
    """
    _check_nesting(path, pickled.value)
    notes = (*notes, *deepspeed.notes_of(path, pickled.value))
    keys, found, chosen = state_dicts.find(path, pickled, key)
    module = None if isinstance(found, dict) else pickled_modules.read(path, found, pickled.budget)
    state_dict = found if module is None else module.tensors
    if module is not None and not state_dict:
        raise state_dicts.nothing_to_show(path, pickled)
    if module is None and any(isinstance(item, Opaque) and state_dicts.is_sharded(item) for item in found.values()):
        raise state_dicts.part_of_a_rank(path, pickled) or state_dicts.nothing_to_show(path, pickled)
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    extras: dict[str, Any] = {}
    known: dict[int, CompositeEntry] = {}  # one tensor may have several names
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
    inner, opaque = nested_tensors.tensors_within(extras, state_dict, str(path), pickled.budget)
    unseen = [name for name, item in extras.items() if composite_tensors.may_be_tensor(item)]
    opaque = [name for name in opaque if name not in unseen]
    left_out = [name for name in state_dicts.left_out_by_guess(pickled.value, keys, key) if name not in state_dict]
    attributes = dict.fromkeys(
        name for name, value in pickled.attributes if nested_tensors.may_hold_tensors(value, pickled.budget)
    )
    hidden_notes = _notes_about(unseen, opaque, tuple(attributes))
    state = state_dict.state if isinstance(state_dict, OrderedDict) else None
    dict_attributes = [
        name for name, value in (state or {}).items() if nested_tensors.may_hold_tensors(value, pickled.budget)
    ]
    metadata = state.get("_metadata") if isinstance(state, dict) else None
    if not isinstance(metadata, dict):
        metadata = {}
    # If the two copies of the record differ, the one in the zip archive counts.
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
        notes=(*notes, *recorded.notes, *chosen, *hidden_notes, *(() if module is None else module.notes)),
        types={} if module is None else module.types,
        kinds=_kinds_of_scales(tensors) if module is None else module.kinds,
        order=tuple(state_dict) if extras else (),
        inner=inner,
        unseen=(*unseen, *opaque, *left_out),
        hidden=(
            *(f"the attribute {name!r} of a tensor" for name in attributes),
            *(f"the attribute {brief_repr(name)} of the state dict" for name in dict_attributes),
            *(() if module is None else module.hidden),
        ),
    )
    return recorded.completed(contents)


def _notes_about(unseen: Sequence[str], opaque: Sequence[str], attributes: Sequence[str]) -> Iterator[str]:
    """Yield the notes about tensors that have no row.

    Args:
        unseen: entries that a call makes, which modelcli does not run.
        opaque: entries with tensors that cannot have rows, or with objects of unknown classes.
        attributes: attributes of tensors that contain tensors.
    """
    if unseen:
        are = "is not shown: a call makes it" if len(unseen) == 1 else "are not shown: calls make them"
        yield f"{listed(unseen, 4)} {are}, and modelcli does not run the code of a file"
    if opaque:
        holds = "holds" if len(opaque) == 1 else "hold"
        yield (
            f"{listed(opaque, 4)} {holds} tensors that cannot have rows of their own, or objects that only running "
            "code could load: the totals leave them out"
        )
    if attributes:
        yield (
            f"some tensors have attributes that contain tensors ({listed(attributes, 4)}): they are not part of the "
            "state dict, so they are not shown"
        )


def _kinds_of_scales(tensors: Mapping[str, TensorEntry | CompositeEntry]) -> dict[str, Kind]:
    """Return as buffers the output scales of quantized modules, each of which is beside a zero point."""
    ends = [name for name, entry in tensors.items() if name.endswith("zero_point") and not entry.shape]
    scales = (f"{name.removesuffix('zero_point')}scale" for name in ends)
    return {name: "buffer" for name in scales if name in tensors and not tensors[name].shape}


#: The types of values that contain no other values.
_LEAVES = (TensorEntry, str, int, float, bytes, type(None), Global, StorageRef)


def _check_nesting(path: Path, tree: Any) -> None:
    """Raise FileFormatError if values are nested deeper than the limit. Each value is visited once."""
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
    """Yield the values directly inside a value."""
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
