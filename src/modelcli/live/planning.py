"""From a live model to a plan for writing: each tensor of its state dict, with the source of its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modelcli import record as records
from modelcli.blueprint import Blueprint, Trace
from modelcli.errors import RequestError
from modelcli.live import trace
from modelcli.live.describe import describe, dtype_name
from modelcli.live.opening import Live
from modelcli.live.sources import Value, is_lazy, real_tensor, source_of
from modelcli.record import Record
from modelcli.references import PythonObject
from modelcli.writing import Plan, PlannedTensor


def plan(live: Live, out: Path, kind: str, *, bare: bool = False) -> Plan:
    """What to write for a live model; `kind` is `pth` or `safetensors`, `bare` drops what stood around the state dict.

    Raises RequestError for what a checkpoint of that kind cannot hold.
    """
    state = live.module.state_dict()
    tensors: dict[str, PlannedTensor] = {}
    extras: dict[str, Any] = {}
    values: dict[int, Value] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = _planned(name, value, kind, values)
        else:
            extras[name] = _inert(name, value)
    contents = live.contents
    tree, key = None, None
    if contents is not None and not bare:
        extras |= {name: value for name, value in contents.extras.items() if name not in state}
        if contents.key is not None and kind == "pth":
            tree, key = contents.tree, contents.key
    if extras and kind == "safetensors":
        raise RequestError(f"{min(extras)} is no tensor, and safetensors holds nothing else", "write a .pth file")
    metadata: Mapping[str, Any] = getattr(state, "_metadata", {})
    if live.architecture is None and contents is not None:
        metadata = contents.metadata
    return Plan(tensors, records.to_text(record_of(live, out.parent)), _plain(metadata), extras, tree, key)


def _planned(name: str, tensor: torch.Tensor, kind: str, values: dict[int, Value]) -> PlannedTensor:
    if is_lazy(tensor):
        raise RequestError(
            f"{name} has no shape yet: its module is lazy",
            "put a module with all its sizes in its place first",
        )
    if tensor.is_quantized or tensor.layout != torch.strided:
        raise RequestError(f"{name} is {tensor.layout}, {dtype_name(tensor.dtype)}: only dense tensors can be written")
    source = source_of(tensor)
    if source is None:
        raise RequestError(f"{name} has no numbers: nothing says where they come from")
    whole = tensor.is_contiguous() and tensor.storage_offset() == 0
    if kind == "safetensors" and not (whole and source.nbytes == tensor.numel() * tensor.element_size()):
        # safetensors holds every tensor by itself, row-major: a view is written as what it shows.
        tensor = real_tensor(tensor).contiguous().clone()
        source = Value(tensor.untyped_storage())
    elif isinstance(source, Value):
        source = values.setdefault(source.storage._cdata, source)
    return PlannedTensor(
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        stride=tuple(tensor.stride()),
        offset=int(tensor.storage_offset()),
        source=source,
    )


def _inert(name: str, value: Any) -> Any:
    """An `_extra_state`, where it is made of plain values."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if type(value) in (list, tuple):
        return type(value)(_inert(name, item) for item in value)
    if type(value) is dict:
        return {key: _inert(name, item) for key, item in value.items()}
    raise RequestError(
        f"{name} holds a {type(value).__name__}, which cannot be written without running code to load it"
    )


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in metadata.items()}


def record_of(live: Live, folder: Path) -> Record:
    """The record of a live model, with Python paths as seen from the folder that it is written to."""
    base = live.architecture
    reference = None
    if base is not None:
        ours = base.reference
        reference = ours.relative_to(folder) if isinstance(ours, PythonObject) else str(ours)
    frozen = tuple(name for name, parameter in live.module.named_parameters() if not parameter.requires_grad)
    previous = live.contents.record if live.contents is not None else None
    return Record(
        reference=reference,
        weights=base.weights if base is not None else None,
        seed=live.seed,
        edits=tuple(live.edits),
        frozen=frozen,
        blueprint=traced(live),
        input_size=live.source.input_size or (previous.input_size if previous else None),
        input_dtype=live.source.input_dtype or (previous.input_dtype if previous else ()),
    )


def traced(live: Live, mode: str = "eval") -> Blueprint:
    """The blueprint of a live model with a forward pass in it; lazy parameters have the shapes it gave them."""
    made, twin = trace_of(live, mode)
    blueprint = live.describe()
    if any(tensor.shape is None for tensor in blueprint.tensors) and made.reason is None:
        blueprint = describe(twin)
    return blueprint.with_trace(made)


def trace_of(live: Live, mode: str) -> tuple[Trace, torch.nn.Module]:
    if live.architecture is None:
        reason = "no architecture is known: --arch names one"
        return Trace(None, reason=reason), live.module
    return trace.trace(live.module, live.inputs, mode=mode)


__all__ = ["plan", "record_of", "traced"]
