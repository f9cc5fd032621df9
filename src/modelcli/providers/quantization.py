"""What a `config.json` says of how its weights are quantized, and the same configuration once they are not.

transformers reads it from `quantization_config`, compressed-tensors from there or from `compression_config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelcli.errors import ModelcliError
from modelcli.providers import configuration

#: The entries of a configuration that describe a quantization.
ENTRIES = ("quantization_config", "compression_config")
#: The methods whose weights and scales are tensors of the files that the class of the model does not have itself.
_WITH_SCALES = frozenset(
    (
        *("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4", "nvfp4", "quark"),
        *("gptq", "awq", "bitsandbytes", "hqq", "eetq", "aqlm", "vptq", "spqr", "higgs", "auto-round"),
    )
)
#: The names of the list of modules that are not quantized, by method.
_LEFT_OUT = {"fp8": "modules_to_not_convert", "fbgemm_fp8": "modules_to_not_convert", "compressed-tensors": "ignore"}


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


def method_of(described: Mapping[str, Any] | None) -> str | None:
    """Return the name of the method: `fp8`, `gptq`; None if it is not stated."""
    found = (described or {}).get("quant_method")
    return found if isinstance(found, str) else None


def method_with_scales(path: Path) -> str | None:
    """Return the method by which the weights in a folder are quantized, if its model has no tensors for the scales.

    transformers builds layers of its own for such weights, so the model as it is described cannot load them.
    """
    method = method_of(beside(path)) if path.is_dir() else None
    return method if method in _WITH_SCALES else None


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


def without(document: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return a configuration of a model that is not quantized any more.

    Args:
        document: the configuration.
        dtype: the dtype of most elements; None leaves what it says.
    """
    found = {name: value for name, value in document.items() if name not in ENTRIES}
    if dtype is not None:
        name = "torch_dtype" if "torch_dtype" in found and "dtype" not in found else "dtype"
        found[name] = dtype
    return found


def leaving_out(document: Mapping[str, Any], modules: Iterable[str]) -> tuple[dict[str, Any], Sequence[str]]:
    """Return a configuration in which more modules are not quantized, and those that it has no list for.

    Args:
        document: the configuration.
        modules: the paths of modules whose weights were dequantized.
    """
    found, modules = dict(document), list(modules)
    for name in ENTRIES:
        described = found.get(name)
        if modules and isinstance(described, dict) and (key := _LEFT_OUT.get(method_of(described) or "")) is not None:
            before = described.get(key)
            listed = [each for each in before if isinstance(each, str)] if isinstance(before, list) else []
            found[name] = {**described, key: [*listed, *(path for path in modules if path not in listed)]}
            return found, []
    return found, modules
