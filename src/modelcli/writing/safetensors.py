"""The writer of `.safetensors`: an aligned JSON header, then each tensor's bytes, tied ones once."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from modelcli import record as records
from modelcli.blueprints import ITEM_BYTES
from modelcli.checkpoints.safetensors import DTYPES, PAIRS
from modelcli.errors import RequestError, SystemFailureError
from modelcli.writing.plan import Plan, PlannedTensor

_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {PAIRS: "F4"}


def _unique(plan: Plan) -> dict[str, PlannedTensor]:
    """Each tensor under its first name, the widest dtypes first so that every one is aligned, else in order."""
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in plan.tensors.items():
        first.setdefault(tensor.view if tensor.source.nbytes else (name,), name)
    names = sorted(first.values(), key=lambda name: -ITEM_BYTES[plan.tensors[name].dtype])
    return {name: plan.tensors[name] for name in names}


def _header_shape(name: str, tensor: PlannedTensor) -> list[int]:
    """The shape, counted in elements: `float4_e2m1fn_x2` has two in each of torch's."""
    if tensor.dtype != PAIRS:
        return list(tensor.shape)
    if not tensor.shape:
        raise RequestError(f"{name} is {PAIRS} without a dimension, which safetensors cannot hold", "write a .pth file")
    return [*tensor.shape[:-1], tensor.shape[-1] * 2]


def write(plan: Plan, file: BinaryIO) -> None:
    """Write header and bytes. Every tensor of the plan is the whole of its source, row-major."""
    tensors = _unique(plan)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", records.SAFETENSORS_KEY: plan.record}}
    position = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise RequestError(f"{name} is {tensor.dtype}, which safetensors has no name for", "write a .pth file")
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": _header_shape(name, tensor),
            "data_offsets": [position, position + tensor.source.nbytes],
        }
        position += tensor.source.nbytes
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise RequestError("a name in it is no valid text, which safetensors asks for", "write a .pth file") from None
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        for chunk in tensor.source.chunks():
            file.write(chunk)


def verify(plan: Plan, path: Path) -> None:
    """Let safetensors' own reader check the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as reader:
            names = set(reader.keys())
    except SafetensorError as error:
        raise SystemFailureError(f"safetensors does not accept what was written: {error}") from None
    if names != set(_unique(plan)):
        raise SystemFailureError("what was read back is not what was written; nothing was changed")
