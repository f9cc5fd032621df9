"""graft on a model of which only keys are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modelcli.edits.applied import Applied, Context
from modelcli.edits.graft.matching import (
    accept,
    module_at,
    notes_of_values,
    refuse_shared_bytes,
    require_same_values,
    row_of,
)
from modelcli.edits.graft.source_part import Part, part_of
from modelcli.errors import RequestError
from modelcli.model import wrapper_prefixes
from modelcli.model.dtypes import FLOATING
from modelcli.model.joined_tensors import made_of, place_of, tied_at
from modelcli.model.key_report import KeyReport
from modelcli.model.paths import joined
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.model.state_dict_match import Mismatch
from modelcli.model.wrapper_prefixes import Unwrapping

if TYPE_CHECKING:
    from modelcli.edits.graft import Graft


def graft_keys(edit: Graft, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
    """Return the model with the source's tensors below a path; they are read when they are written."""
    if edit.also_init:
        raise RequestError(
            "--also-init calls the modules' reset_parameters, but a plain state dict records no classes",
            "--arch names the architecture, or --no-strict leaves what is missing as it is",
        )
    path = module_at(edit, model.blueprint)
    part = part_of(edit, context)
    taken = taking_of_keys(edit, model, path, part, context)
    shown_bytes = model.shown
    refuse_shared_bytes(shown_bytes, taken.names)
    new: dict[int, StateDictTensor] = {}
    entries = dict(model.entries)
    for name, old_name in taken.names.items():
        own = model.tensors[name]
        if own.identity not in new:
            new[own.identity] = _with_values_of(own, part.tensors[old_name], name)
    for name, tensor in model.tensors.items():
        if (made := new.get(tensor.identity)) is not None:
            entries[name] = tied_at(made, place_of(name, tensor))
    changed = StateDictModel(entries, model.modules, described_modules=model.module_infos)
    blueprint = model.blueprint
    changes = row_of(edit, part, path, blueprint, taken.names)
    dtypes = {name: part.tensors[old].dtype for name, old in taken.names.items()}
    notes = [*part.notes, *taken.notes, *notes_of_values(blueprint, list(taken.names), dtypes)]
    return Applied(changed, changes, notes, context.inputs)


@dataclass(frozen=True)
class Taking:
    """Which tensors of a state-dict model get which values.

    Attributes:
        names: for each of its names the name in the part of the source.
        unwrapping: what was removed from the source's keys.
        unexpected: the keys of the part that have no place here.
        notes: what there is to say.
    """

    names: Mapping[str, str]
    unwrapping: Unwrapping
    unexpected: tuple[str, ...]
    notes: tuple[str, ...]


def taking_of_keys(edit: Graft, model: StateDictModel, path: str, part: Part, context: Context) -> Taking:
    """Match the keys of a part of the source with those below a path of a state-dict model.

    Raises KeysDoNotMatchError where they do not match, and RequestError for tied names with different values.
    """
    prefix = joined(path, "")
    known = model.tensors
    dense = {name for name, tensor in known.items() if tensor.shape is not None}
    keys = [name.removeprefix(prefix) for name in model.keys if name.startswith(prefix)]
    own = {key: known[prefix + key].shape if prefix + key in known else None for key in keys}
    tensors, others = part.tensors, set(part.others)
    found = {name: tensors[name].shape if name in tensors else None for name in (*tensors, *others)}
    unwrapping = wrapper_prefixes.fit(found, own)
    names = {unwrapping.key(name): name for name in found if name not in unwrapping.dropped}
    both = [key for key in own if key in names]
    not_dense = [key for key in both if prefix + key not in dense or names[key] in others]
    left = set(not_dense)
    alike = [key for key in both if key not in left]
    wrong = [key for key in alike if not _same_shape(own[key], found[names[key]])]
    mismatched = set(wrong)
    taken = {prefix + key: names[key] for key in alike if key not in mismatched}
    identities = {known[name].identity for name in taken}
    report = KeyReport(
        len(taken),
        tuple(
            key
            for key in own
            if key not in names and (prefix + key not in known or known[prefix + key].identity not in identities)
        ),
        tuple(key for key in names if key not in own),
        tuple(Mismatch(key, own[key] or (), found[names[key]] or ()) for key in wrong),
        unwrapping,
    )
    notes = accept(edit, part, path, report, not_dense)
    _refuse_conflicts(known, taken, tensors, context)
    return Taking(taken, unwrapping, report.unexpected, tuple(notes))


def _same_shape(own: tuple[int, ...] | None, found: tuple[int, ...] | None) -> bool:
    return own == found or (own == () and found == (1,))


def _refuse_conflicts(
    known: Mapping[str, StateDictTensor],
    taken: Mapping[str, str],
    tensors: Mapping[str, StateDictTensor],
    context: Context,
) -> None:
    """Raise RequestError where the source has different values for the names of one tensor."""
    first: dict[int, str] = {}
    for name, old in taken.items():
        other = first.setdefault(known[name].identity, name)
        require_same_values(context, (other, name), (taken[other], old), tensors)


def _with_values_of(own: StateDictTensor, other: StateDictTensor, name: str) -> StateDictTensor:
    """Return a tensor of the model with the values of another one, converted to its dtype."""
    made = made_of([other], 0, own.identity, place_of(name, own), own.shape)
    made = replace(made, kind=own.kind, requires_grad=own.requires_grad, persistent=own.persistent)
    if made.dtype == own.dtype:
        return made
    if not {made.dtype, own.dtype} <= FLOATING:
        raise RequestError(
            f"{name} is {made.dtype} in the source and {own.dtype} here, and only floating-point values are converted",
            "--arch names the architecture, which can convert others",
        )
    return made.cast(own.dtype)
