"""Make the plan for writing a live model: each tensor of its state dict with the source of its bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelcli import writing
from modelcli.checkpoints import formats, shapes
from modelcli.checkpoints import record as records
from modelcli.checkpoints.record import Record
from modelcli.edits import kind_of
from modelcli.errors import RequestError
from modelcli.language.references import PythonObject
from modelcli.live import composites, trace
from modelcli.live.describe import describe, dtype_name
from modelcli.live.inert import inert_of
from modelcli.live.providers.base import ModelFolder
from modelcli.live.sources import AnySource, Value, flag_of, is_composite, is_lazy, row_major, source_of
from modelcli.live.trace import Traced
from modelcli.model.blueprint import Blueprint
from modelcli.providers import configuration
from modelcli.writing import Plan, PlannedTensor
from modelcli.writing.state_dict import plan_of

if TYPE_CHECKING:
    from modelcli.live.opening import Live


def plan(
    live: Live,
    out: Path,
    kind: str,
    *,
    bare: bool = False,
    compact: bool = False,
    record: Record | None = None,
    made: Traced | None = None,
    with_record: bool = True,
) -> Plan:
    """What to write for a live model, in a format of `writing`.

    `bare` drops what stood around the state dict. `compact` writes of each storage what the tensors show of it: without
    it a slice of a large buffer takes the whole buffer along, as `torch.save` does. `record` is the one to write, by
    default that of the live model; `made` is the forward pass that goes into it, where one was made already. Without
    `with_record` the plan has none, and no forward pass is made.

    Raises RequestError for what a checkpoint of that kind cannot hold.
    """
    library_folder = _library_folder(live, kind)
    state = live.module.state_dict() if library_folder is None else dict(library_folder.tensors)
    digest = None if library_folder is None else _digest_of_configuration(library_folder)
    tensors: dict[str, PlannedTensor] = {}
    extras: dict[str, Any] = {}
    sources: dict[object, AnySource] = {}
    names = list(state)
    for name in names:
        value = state[name]
        planned = partial(_planned, name, kind=kind, sources=sources)
        if not isinstance(value, torch.Tensor):
            extras[name] = inert_of(name, value, planned)
        elif is_composite(value):
            extras[name] = composites.planned(value, planned)
        else:
            tensors[name] = planned(value)
    made_plan = plan_of(
        tensors,
        extras,
        names,
        kind,
        lambda name: row_major(state[name]),
        contents=live.contents,
        metadata=_plain(getattr(state, "_metadata", {})),
        record=lambda: (
            records.to_text(
                replace(record or record_of(live, Path(os.path.realpath(out)).parent, made), configuration=digest)
            )
            if with_record
            else ""
        ),
        bare=bare,
        compact=compact,
        companions=None if library_folder is None else library_folder.companions,
    )
    if library_folder is None:
        return made_plan
    notes = (*library_folder.notes, *made_plan.notes)
    return replace(made_plan, notes=notes, whole_for=library_folder.whole_for)


def _library_folder(live: Live, kind: str) -> ModelFolder | None:
    """The folder of the model's library, where a folder is written and the library has such a form."""
    if live.architecture is None or not formats.named(kind).is_folder:
        return None
    return live.architecture.provider.model_folder(live.architecture, live.module, live.own_folder)


def _digest_of_configuration(folder: ModelFolder) -> str | None:
    """The digest of the configuration in a library's folder, by which the record knows that it has not changed."""
    source = folder.companions.get(configuration.NAME)
    return None if source is None else configuration.digest_of(b"".join(source.chunks()))


def _planned(name: str, tensor: torch.Tensor, kind: str, sources: dict[object, AnySource]) -> PlannedTensor:
    if is_lazy(tensor):
        raise RequestError(
            f"{name} has no shape yet: its module is lazy",
            "put a module with all its sizes in its place first",
        )
    if hasattr(tensor, "__tensor_flatten__"):
        raise RequestError(
            f"{name} is a {type(tensor).__name__}, whose values only its own class can write",
            "write tensor.dequantize() in its place",
        )
    source = source_of(tensor)
    if source is None:
        raise RequestError(f"it is not known where the values of {name} come from")
    if isinstance(source, Value):
        source = sources.setdefault(source.storage._cdata, source)
    shape, stride, offset = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
    if not writing.holds_views(kind):
        # The format stores every tensor separately in row-major order, so the elements of a view are written.
        view = (source, offset, shape, stride, tensor.dtype)
        if view not in sources:
            sources[view] = row_major(tensor)
        source, stride, offset = sources[view], shapes.row_major(shape), 0
    return PlannedTensor(shape=shape, dtype=dtype_name(tensor.dtype), stride=stride, offset=offset, source=source)


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in metadata.items()}


def record_of(live: Live, folder: Path, made: Traced | None = None) -> Record:
    """The record of a live model, with Python paths as seen from the folder that it is written to.

    `made` is a forward pass of the model as it is, where one was made already.
    """
    base = live.architecture
    reference = None
    if base is not None:
        ours = base.reference
        if isinstance(ours, PythonObject):
            reference = ours.relative_to(folder, base.folder)
        else:
            reference = base.provider.recorded_reference(base)
    frozen = tuple(name for name, parameter in live.module.named_parameters() if flag_of(parameter) is False)
    return Record(
        reference=reference,
        weights=base.weights if base is not None else None,
        seed=live.seed,
        edit_count=live.edit_count,
        edits=tuple(line for _, line in live.edits),
        numbers=tuple(number for number, _ in live.edits),
        frozen=frozen,
        blueprint=traced(live, made=made),
        input_size=live.inputs.shapes or None if live.inputs is not None and _is_stated(live) else None,
        input_dtype=live.inputs.dtypes if live.inputs is not None else (),
        inputs=live.inputs.texts if live.inputs is not None and _is_stated(live) else (),
    )


def _is_stated(live: Live) -> bool:
    """Whether the record must state the inputs, because the user stated them or an edit changed them."""
    recorded = live.record is not None and (live.record.input_size is not None or live.record.inputs)
    changed = any(kind_of(line).changes_input for _, line in live.edits)
    return bool(changed or live.source.input_size is not None or live.source.inputs or recorded)


def traced(live: Live, mode: str = "eval", *, with_values: bool = False, made: Traced | None = None) -> Blueprint:
    """The blueprint of a live model with a forward pass in it; lazy parameters have the shapes it gave them.

    A model that the meta device cannot run is run under fake tensors; `with_values` on the CPU, where memory allows.
    """
    made = made or _forward_pass(live, mode, with_values=with_values)
    blueprint = live.describe_loaded()
    if any(tensor.shape is None for tensor in blueprint.tensors) and made.trace.reason is None:
        blueprint = describe(made.module)
    return blueprint.with_trace(made.trace)


def _forward_pass(live: Live, mode: str, *, with_values: bool = False) -> Traced:
    made = trace.trace(live.module, live.inputs, mode=mode, real=live.real_module if with_values else None)
    if made.trace.reason is None or live.inputs is None or (described := live.described_copy()) is None:
        return made
    again = trace.trace(described, live.inputs, mode=mode)
    return made if again.trace.reason is not None else again


__all__ = ["plan", "record_of", "traced"]
