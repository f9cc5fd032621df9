"""Recognise weights that need scales beside them: block-scaled fp8, and weights packed by GPTQ, AWQ or bitsandbytes.

modelcli recognises them by the names and dtypes that the programs which write them use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from modelcli.model.paths import joined

#: The endings that turn the name of a narrow weight into that of its scale: DeepSeek and Qwen (block-scaled fp8),
#: compressed-tensors and ModelOpt (fp8, NVFP4), bitsandbytes (int8 and 4 bits).
_SCALE_ENDINGS = (
    *("_scale_inv", "_scale", "_scale_2", "_scales", "_global_scale", "_zero_point"),
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".nested_offset"),
)
#: The names of the scale beside `weight` in a module: ComfyUI's fp8, bitsandbytes' int8.
_SCALE_NAMES = ("scale_weight", "weight_scale", "SCB")
#: The name of a packed weight, the program that packs it, and the names of its scales.
_PACKED = {
    "qweight": ("GPTQ or AWQ", ("scales", "qzeros", "g_idx")),
    "weight_packed": ("compressed-tensors", ("weight_scale", "weight_global_scale", "weight_zero_point")),
    "W_q": ("HQQ", ("scale", "zero")),
    "W_q_meta": ("HQQ", ("scale", "zero")),
}
_NARROW = ("float8", "float4", "float6", "int8", "uint8", "int32", "uint32")


@dataclass(frozen=True)
class Scaled:
    """A weight, the scale that multiplies it, and `how` it is stored, for messages."""

    weight: str
    scale: str
    how: str


def scaled_weights(dtypes: Mapping[str, str]) -> dict[str, Scaled]:
    """Return the tensors that are such a weight or its scale, by name. `dtypes` are the dtypes of all tensors."""
    found: dict[str, Scaled] = {}
    for name, dtype in dtypes.items():
        if dtype.startswith(_NARROW):
            for scale, how in _scales_of(name, dtype):
                if scale in dtypes:
                    pair = Scaled(name, scale, how)
                    found.setdefault(name, pair)
                    found.setdefault(scale, pair)
    return found


def _scales_of(name: str, dtype: str) -> Iterator[tuple[str, str]]:
    """Yield possible names of a weight's scales, the most specific first, and how the weight would be stored."""
    path, _, own = name.rpartition(".")
    if own in _PACKED:
        how, scales = _PACKED[own]
        for scale in scales:
            yield joined(path, scale), f"a weight packed by {how}"
        return
    for ending in _SCALE_ENDINGS:
        packed = ending.startswith(".") or not dtype.startswith("float")
        yield name + ending, f"a {'packed' if packed else 'scaled'} {dtype} weight"
    if own == "weight":
        for scale in _SCALE_NAMES:
            yield joined(path, scale), f"a scaled {dtype} weight"
