"""Weights that mean nothing without the scales beside them: in blocks of fp8, or packed by GPTQ, AWQ, bitsandbytes.

They are told by their names and dtypes, as the programs that write them call them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from modelcli.model.paths import joined

#: What stands behind the name of a weight of a narrow dtype, in that of its scale: DeepSeek and Qwen (block-scaled
#: fp8), compressed-tensors and ModelOpt (fp8, NVFP4), bitsandbytes (int8 and 4 bits).
_BEHIND = (
    *("_scale_inv", "_scale", "_scale_2", "_scales", "_global_scale", "_zero_point"),
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".nested_offset"),
)
#: What the scale of a module's weight is called beside it: fp8 for ComfyUI, bitsandbytes' int8.
_BESIDE = ("scale_weight", "weight_scale", "SCB")
#: The packed weight of a module, and what else there is of its scales under names that say nothing of it.
_PACKED = {
    "qweight": ("GPTQ or AWQ", ("scales", "qzeros", "g_idx")),
    "weight_packed": ("compressed-tensors", ("weight_scale", "weight_global_scale", "weight_zero_point")),
    "W_q": ("HQQ", ("scale", "zero")),
    "W_q_meta": ("HQQ", ("scale", "zero")),
}
_NARROW = ("float8", "float4", "float6", "int8", "uint8", "int32", "uint32")


@dataclass(frozen=True)
class Scaled:
    """A weight with the scale that it is multiplied by; `how` names the way in which it is stored."""

    weight: str
    scale: str
    how: str


def scaled_weights(dtypes: Mapping[str, str]) -> dict[str, Scaled]:
    """The tensors that are such a weight or its scale, by name; `dtypes` are those of all tensors."""
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
    """What the scales of a weight may be called, the most telling name first, and how the weight would be stored."""
    path, _, own = name.rpartition(".")
    if own in _PACKED:
        how, scales = _PACKED[own]
        for scale in scales:
            yield joined(path, scale), f"a weight packed by {how}"
        return
    for ending in _BEHIND:
        packed = ending.startswith(".") or not dtype.startswith("float")
        yield name + ending, f"a {'packed' if packed else 'scaled'} {dtype} weight"
    if own == "weight":
        for scale in _BESIDE:
            yield joined(path, scale), f"a scaled {dtype} weight"
