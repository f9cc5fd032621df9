"""State dicts in files of each format, written and read without modelcli, and compared bit by bit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
#: Names of files that hold a state dict: `folder` is one of shards.
FILES = ("a.pth", "a.safetensors", "a")


def write(state: State, name: str) -> None:
    """Write a state dict as its name says. A folder has two shards and their index."""
    if name.endswith(".pth"):
        torch.save(state, name)
    elif name.endswith(".safetensors"):
        save_file(state, name)
    else:
        Path(name).mkdir()
        names = list(state)
        shards = {"one.safetensors": names[: len(names) // 2], "two.safetensors": names[len(names) // 2 :]}
        for shard, own in shards.items():
            save_file({key: state[key] for key in own}, Path(name, shard))
        where = {key: shard for shard, own in shards.items() for key in own}
        index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": where}
        Path(name, "model.safetensors.index.json").write_text(json.dumps(index))


def read(name: str) -> State:
    """Read a state dict."""
    if name.endswith(".pth"):
        return dict(torch.load(name, weights_only=True))
    if name.endswith(".safetensors"):
        return load_file(name)
    return {key: value for shard in sorted(Path(name).glob("*.safetensors")) for key, value in load_file(shard).items()}


def other(name: str) -> str:
    """Return the name of another file of the same format."""
    return "b/" if name == "a" else name.replace("a.", "b.", 1)


def assert_same(found: State, expected: State) -> None:
    """Require the same keys, and tensors that are the same bit by bit, row-major, and by themselves in memory."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert bits(found[name]) == bits(value), name
        assert found[name].is_contiguous(), name


def bits(value: torch.Tensor) -> bytes:
    """Return the bytes of a tensor's elements in row-major order."""
    own = value.detach().clone(memory_format=torch.contiguous_format)
    return own.reshape(-1).view(torch.uint8).numpy().tobytes() if own.numel() else b""


def parts_of(name: str) -> tuple[dict[str, Any], bytes]:
    """Return what the header of a safetensors file says of its tensors, and the bytes behind it."""
    data = Path(name).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    return header, data[8 + length :]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return random bits as a tensor of any dtype, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.empty(0, dtype=dtype).element_size()
    for size in shape:
        count *= size
    made = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return made.view(dtype).reshape(shape)
