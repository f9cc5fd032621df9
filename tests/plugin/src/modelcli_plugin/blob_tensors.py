"""What a program that does not know modelcli reads and writes blobs with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from modelcli_plugin.blob import MAGIC, START


def load(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; a tied tensor is one object under all its names."""
    data = bytearray(Path(path).read_bytes())
    magic, length = START.unpack_from(data)
    assert magic == MAGIC
    start = START.size + length
    found: dict[str, torch.Tensor] = {}
    first: dict[int, torch.Tensor] = {}
    for name, (dtype, shape, offset) in json.loads(data[START.size : start])["tensors"].items():
        kind = getattr(torch, dtype)
        nbytes = torch.Size(shape).numel() * kind.itemsize
        tensor = torch.tensor(data[start + offset : start + offset + nbytes], dtype=torch.uint8).view(kind)
        found[name] = first.setdefault(offset, tensor.reshape(shape)) if nbytes else tensor.reshape(shape)
    return found


def save(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Write tensors to a file, each once."""
    listed: dict[str, object] = {}
    places: dict[int, int] = {}
    body = b""
    for name, tensor in tensors.items():
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if (place := places.setdefault(id(tensor), len(body))) == len(body):
            body += data
        listed[name] = str(tensor.dtype).removeprefix("torch."), list(tensor.shape), place
    text = json.dumps({"record": None, "tensors": listed}).encode()
    Path(path).write_bytes(START.pack(MAGIC, len(text)) + text + body)
