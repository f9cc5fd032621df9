"""What a program that does not know modelcli reads and writes blobs with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from modelcli_plugin.blob import MAGIC, START, header_of


def load(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a file by name."""
    header, start = header_of(Path(path))
    data = bytearray(Path(path).read_bytes())
    found = {}
    for name, (dtype, shape, offset) in header["tensors"].items():
        kind = getattr(torch, dtype)
        count = torch.Size(shape).numel()
        found[name] = torch.frombuffer(data, dtype=kind, count=count, offset=start + offset).reshape(shape).clone()
    return found


def save(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Write tensors to a file."""
    listed: dict[str, object] = {}
    body = b""
    for name, tensor in tensors.items():
        listed[name] = str(tensor.dtype).removeprefix("torch."), list(tensor.shape), len(body)
        body += tensor.contiguous().numpy().tobytes()
    text = json.dumps({"record": None, "tensors": listed}).encode()
    Path(path).write_bytes(START.pack(MAGIC, len(text)) + text + body)
