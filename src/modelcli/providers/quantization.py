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


#: The methods of quantization by their names in `quant_method`, as their programs call themselves.
_METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM",
    "fp8": "fp8",
    "fp_quant": "FP-Quant",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}


def described_in(document: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return what a configuration, or a part of it such as its `text_config`, says of the quantization.

    None if it says nothing.
    """
    for part in _parts(document or {}):
        for name in ENTRIES:
            if isinstance(found := part.get(name), dict) and found:
                return found
    return None


def _parts(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a configuration and the configurations in it, those of a model of text and images, for instance."""
    return [document, *(part for name, part in document.items() if name.endswith("_config") and isinstance(part, dict))]


def without(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says nothing of a quantization."""
    return {
        name: {own: value for own, value in part.items() if own not in ENTRIES}
        if name.endswith("_config") and isinstance(part, dict)
        else part
        for name, part in document.items()
        if name not in ENTRIES
    }


def method_in(described: Mapping[str, Any] | None) -> str | None:
    """Return the name of the method that a configuration states, with the format of compressed-tensors.

    None if it states none. An unknown name is returned as it is, and cut.
    """
    stated = (described or {}).get("quant_method")
    if stated == "compressed-tensors":
        form = (described or {}).get("format")
        return f"compressed-tensors ({form:.40})" if isinstance(form, str) else "compressed-tensors"
    return _METHODS.get(stated.lower(), f"{stated:.40}") if isinstance(stated, str) and stated else None


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
