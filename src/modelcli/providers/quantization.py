"""What a `config.json` says of how its weights are quantized.

transformers reads it from `quantization_config`, compressed-tensors from there or from `compression_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelcli.errors import ModelcliError
from modelcli.providers import configuration

#: The entries of a configuration that describe a quantization.
ENTRIES = ("quantization_config", "compression_config")


def described_in(document: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return what a configuration says of its quantization; None if it says nothing."""
    for name in ENTRIES:
        if isinstance(found := (document or {}).get(name), dict) and found:
            return found
    return None


def beside(path: Path) -> Mapping[str, Any] | None:
    """Return what the configuration in a folder, or beside a file, says of its quantization.

    None if there is none, or none that can be read.
    """
    try:
        return described_in(configuration.configuration_in(path if path.is_dir() else path.parent))
    except ModelcliError:
        return None


def block_size(described: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Return the rows and columns of a block that a configuration states; None if it states none, or several."""
    stated = [(described or {}).get("weight_block_size")]
    groups = (described or {}).get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        stated.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    found = {size for each in stated if (size := _size(each)) is not None}
    return found.pop() if len(found) == 1 else None


def _size(stated: Any) -> tuple[int, int] | None:
    """Return a block size as a configuration writes it: `[128, 128]` or `128x128`."""
    if isinstance(stated, str):
        stated = [int(part) for part in stated.split("x") if part.isascii() and part.isdecimal() and len(part) < 10]
    if not isinstance(stated, list) or len(stated) != 2 or not all(type(size) is int and size > 0 for size in stated):
        return None
    return stated[0], stated[1]
