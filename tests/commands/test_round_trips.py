"""An edit of keys and its inverse give the bytes of the first file back, whoever wrote it.

`--bare-keys` writes tensors alone, so no list of edits makes a difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Cli

PAIRS = {
    "permute": (("permute", "**.proj.weight", "1,2,0"), ("permute", "**.proj.weight", "2,0,1")),
    "rename": (("rename", "blocks.**", "encoder.**"), ("rename", "encoder.**", "blocks.**")),
    "split": (
        ("split", "**.qkv.weight", "**.q.weight", "**.k.weight", "**.v.weight"),
        ("concat", "**.q.weight", "**.k.weight", "**.v.weight", "**.qkv.weight"),
    ),
    "unstack": (
        ("unstack", "**.experts.weight", "**.experts.*.weight"),
        ("stack", "**.experts.*.weight", "**.experts.weight"),
    ),
    "reshape": (("reshape", "**.proj.weight", "6,4"), ("reshape", "**.proj.weight", "2,3,4")),
}


def tensors() -> dict[str, torch.Tensor]:
    """Two blocks with tensors of several shapes and dtypes, NaN and a negative zero among the values."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number in range(2):
        block = f"blocks.{number}"
        found[f"{block}.qkv.weight"] = torch.randn(12, 4, generator=generator).bfloat16()
        found[f"{block}.proj.weight"] = torch.randn(2, 3, 4, generator=generator)
        found[f"{block}.experts.weight"] = torch.randn(3, 2, 2, generator=generator).half()
        found[f"{block}.steps"] = torch.tensor(number)
        found[f"{block}.proj.weight"][0, 0, 0] = float("nan")
        found[f"{block}.proj.weight"][0, 0, 1] = -0.0
    return found


def first_file(name: str, cli: Cli) -> None:
    """Write the tensors as safetensors does; a .pth and a folder as modelcli does.

    torch.save names its archive after the file. Where a shard ends depends on the order of the
    tensors before it, and in a folder it is that of their names.
    """
    if name.endswith(".safetensors"):
        save_file(tensors(), name, metadata={"format": "pt"})
    else:
        torch.save(dict(sorted(tensors().items())), "torch.pth")
        cli("save", name, "-m", "torch.pth", "--bare-keys", *limit_of(name))


def limit_of(name: str) -> tuple[str, ...]:
    """Return the option for small shards, where there are any."""
    return ("--max-shard-size", "100") if name.endswith("/") else ()


def content(name: str) -> Any:
    """Return the bytes of a file, or of each file of a folder."""
    path = Path(name)
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("name", ["{}.safetensors", "{}.pth", "{}/"])
@pytest.mark.parametrize("pair", PAIRS)
def test_an_edit_and_its_inverse_give_the_first_file(cli: Cli, pair: str, name: str) -> None:
    first, second, third = (name.format(one) for one in ("first", "second", "third"))
    first_file(first, cli)
    for edit, before, after in zip(PAIRS[pair], (first, second), (second, third), strict=True):
        cli(*edit, "-m", before, "-o", after, "--bare-keys", *limit_of(name))
    assert content(second) != content(first)
    assert content(third) == content(first)


def test_what_a_file_cannot_hold_is_recorded_with_bare_keys(cli: Cli) -> None:
    """Which parameters are frozen is in no tensor."""
    save_file(tensors(), "first.safetensors")
    cli("freeze", "blocks.0", "-m", "first.safetensors", "-o", "frozen.safetensors", "--bare-keys")
    cli("check", "frozen.safetensors", "--frozen", "blocks.0")
    assert b"modelcli" in content("frozen.safetensors")
    cli("rename", "blocks.**", "**", "-m", "frozen.safetensors", "-o", "bare.safetensors", "--bare-keys")
    assert b"modelcli" not in content("bare.safetensors")
