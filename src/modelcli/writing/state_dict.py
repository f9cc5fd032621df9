"""The plan of a whole state dict: what its format can hold, and what stood around it in its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelcli.checkpoints import Contents, formats
from modelcli.checkpoints.plan import Plan, PlannedTensor, Source
from modelcli.writing import compacting
from modelcli.writing.extras import belongs_to_model, is_empty, left_out_note, refusal_of_values


def plan_of(
    tensors: Mapping[str, PlannedTensor],
    extras: Mapping[str, Any],
    names: Sequence[str],
    kind: str,
    row_major: Callable[[str], Source],
    *,
    contents: Contents | None,
    metadata: Mapping[str, Any],
    record: Callable[[], str],
    bare: bool,
    compact: bool,
    companions: Mapping[str, Source] | None = None,
) -> Plan:
    """Put the planned entries of a state dict together as a checkpoint.

    Args:
        tensors: its plain tensors.
        extras: its other entries, as inert values.
        names: the keys of both, in the order in which they are written.
        kind: the format.
        row_major: gives the elements of a tensor one after another, for `compact`.
        contents: the file that the state dict comes from, if any.
        metadata: its `_metadata`.
        record: gives the text of the record, which may take a forward pass: nothing is refused after it.
        bare: whether to drop what the file held around the state dict.
        compact: whether to write only the bytes that tensors use.
        companions: the files beside the weights in the folder of a library's model; None for a plain checkpoint.

    Raises RequestError for entries that the format cannot store.
    """
    format_ = formats.named(kind)
    planned, others = dict(tensors), dict(extras)
    tree, key = None, None
    if bare:
        others = {name: value for name, value in others.items() if belongs_to_model(name, value)}
    elif contents is not None and contents.key is not None and format_.holds_values:
        tree, key = contents.tree, contents.key
    notes = []
    if not format_.holds_values:
        notes += left_out_note(others, kind)
        others = {name: value for name, value in others.items() if not is_empty(value)}
        if others:
            raise refusal_of_values(others, kind)
    if format_.holds_views:
        if compact:
            planned = compacting.compacted(planned, row_major)
        elif note := compacting.unused_bytes_note(planned):
            notes.append(note)
    return Plan(
        planned,
        record(),
        metadata,
        others,
        tree,
        key,
        {} if contents is None else contents.texts,
        tuple(name for name in names if name in planned or name in others),
        tuple(notes),
        companions,
    )
