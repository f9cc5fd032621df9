"""Convert blueprints to plain JSON values and back, with every value checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from modelcli.model.blueprint import Blueprint, LayerTrace, ModuleInfo, Trace
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Shape, TensorInfo

_T = TypeVar("_T")


def to_json(blueprint: Blueprint) -> dict[str, Any]:
    """Return the blueprint as plain JSON values. Default values are left out, and each class is listed once."""
    classes: dict[tuple[str | None, tuple[str, ...]], int] = {}
    modules = []
    for module in blueprint.modules:
        number = classes.setdefault((module.type, module.bases), len(classes))
        entry: dict[str, Any] = {"path": module.path, "class": number}
        for key in ("config", "shared_with", "own_repr"):
            if value := getattr(module, key):
                entry[key] = value
        if module.absent:
            entry["absent"] = [list(pair) for pair in module.absent]
        modules.append(entry)
    tensors = []
    for tensor in blueprint.tensors:
        entry = {"name": tensor.name, "shape": tensor.shape and list(tensor.shape), "dtype": tensor.dtype}
        if tensor.shape == ():
            entry["shape"] = []
        if tensor.kind != "parameter":
            entry["kind"] = tensor.kind
        if tensor.requires_grad is not None:
            entry["requires_grad"] = tensor.requires_grad
        if tensor.tied_to is not None:
            entry["tied_to"] = tensor.tied_to
        if not tensor.persistent:
            entry["persistent"] = False
        if tensor.layout != "strided":
            entry["layout"] = tensor.layout
        if tensor.stored_bytes is not None:
            entry["stored_bytes"] = tensor.stored_bytes
        tensors.append(entry)
    document: dict[str, Any] = {
        "classes": [{"type": kind, "bases": list(bases)} for kind, bases in classes],
        "modules": modules,
        "tensors": tensors,
    }
    if blueprint.landmarks:
        document["landmarks"] = {word: list(paths) for word, paths in blueprint.landmarks.items()}
    if trace := blueprint.trace:
        document["trace"] = {
            "inputs": None if trace.inputs is None else [list(shape) for shape in trace.inputs],
            "layers": [[path, layer.output_shape, layer.macs] for path, layer in trace.layers.items()],
            "macs": trace.macs,
            "input_bytes": trace.input_bytes,
            "forward_backward_bytes": trace.forward_backward_bytes,
            "reason": trace.reason,
        }
        for key in ("notes", "uncounted", "unseen"):
            if texts := getattr(trace, key):
                document["trace"][key] = list(texts)
        if trace.device != "meta":
            document["trace"]["device"] = trace.device
    return document


def from_json(document: Mapping[str, Any]) -> Blueprint:
    """The inverse of `to_json`. Raises KeyError, TypeError, ValueError or IndexError on anything else."""
    classes = [(_optional_text(entry["type"]), tuple(map(_text, entry["bases"]))) for entry in document["classes"]]
    modules = tuple(
        ModuleInfo(
            path=_text(entry["path"]),
            type=classes[entry["class"]][0],
            bases=classes[entry["class"]][1],
            config=_text(entry.get("config", "")),
            shared_with=_optional_text(entry.get("shared_with")),
            own_repr=_optional_text(entry.get("own_repr")),
            absent=tuple((_size(position), _text(name)) for position, name in entry.get("absent", ())),
        )
        for entry in document["modules"]
    )
    tensors = tuple(
        TensorInfo(
            name=_text(entry["name"]),
            shape=None if entry["shape"] is None else shape_from_json(entry["shape"]),
            dtype=_dtype(entry["dtype"]),
            kind=_one_of(("parameter", "buffer"), entry.get("kind", "parameter")),
            requires_grad=_one_of((None, True, False), entry.get("requires_grad")),
            tied_to=_optional_text(entry.get("tied_to")),
            persistent=_one_of((True, False), entry.get("persistent", True)),
            layout=_text(entry.get("layout", "strided")),
            stored_bytes=_optional_size(entry.get("stored_bytes")),
        )
        for entry in document["tensors"]
    )
    if not modules or modules[0].path:
        raise ValueError("a blueprint starts with its root")
    for names in ([module.path for module in modules], [tensor.name for tensor in tensors]):
        if len(set(names)) < len(names):
            raise ValueError("a blueprint lists each path once")
    trace = None
    if entry := document.get("trace"):
        inputs = entry["inputs"]
        trace = Trace(
            inputs=None if inputs is None else tuple(map(shape_from_json, inputs)),
            layers={
                _text(path): LayerTrace(_output_shape(shape), _optional_size(macs))
                for path, shape, macs in entry["layers"]
            },
            macs=_optional_size(entry["macs"]),
            input_bytes=_optional_size(entry["input_bytes"]),
            forward_backward_bytes=_optional_size(entry["forward_backward_bytes"]),
            reason=_optional_text(entry["reason"]),
            device=_one_of(("meta", "cpu", "fake", None), entry.get("device", "meta")),
            notes=tuple(map(_text, entry.get("notes", ()))),
            uncounted=tuple(map(_text, entry.get("uncounted", ()))),
            unseen=tuple(map(_text, entry.get("unseen", ()))),
        )
    landmarks = {_text(word): tuple(map(_text, paths)) for word, paths in document.get("landmarks", {}).items()}
    return Blueprint(modules, tensors, trace, landmarks)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _optional_text(value: object) -> str | None:
    return None if value is None else _text(value)


def _one_of(allowed: tuple[_T, ...], value: object) -> _T:
    for known in allowed:
        if value is known or (isinstance(known, str) and value == known):
            return known
    raise ValueError(f"expected one of {allowed}, found {value!r}")


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"expected a size, found {value!r}")
    return value


def _optional_size(value: object) -> int | None:
    return None if value is None else _size(value)


def shape_from_json(value: object) -> Shape:
    """Return a list of sizes as a shape. Raises TypeError or ValueError for anything else."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"expected a shape, found {value!r}")
    return tuple(map(_size, value))


#: How deep lists and dicts may be nested in the shape of an output.
_MAX_OUTPUT_DEPTH = 50


def _output_shape(value: Any, depth: int = 0) -> Any:
    """Check and return a `LayerTrace.output_shape`: a list of ints, a list or dict of those, or None."""
    if depth > _MAX_OUTPUT_DEPTH:
        raise ValueError(f"an output of more than {_MAX_OUTPUT_DEPTH} levels")
    match value:
        case None:
            return None
        case dict():
            return {key: _output_shape(item, depth + 1) for key, item in value.items()}
        case list() | tuple() if all(type(item) is int for item in value):
            return list(shape_from_json(value))
        case list() | tuple():
            return [_output_shape(item, depth + 1) for item in value]
    raise TypeError(f"expected the shape of an output, found {value!r}")


def _dtype(value: object) -> str:
    if value not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {value!r}")
    return str(value)
