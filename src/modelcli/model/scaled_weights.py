"""Recognise weights that need scales beside them: block-scaled fp8, and weights packed by GPTQ, AWQ or bitsandbytes.

modelcli recognises them by the names and dtypes that the programs which write them use.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
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
#: The endings and names of scales that multiply the elements of an fp8 weight, and nothing else.
_PLAIN_ENDINGS, _PLAIN_NAMES = ("_scale_inv", "_scale"), ("scale_weight", "weight_scale")
#: What else stands beside a weight whose values are not its elements times one scale each.
_FURTHER_ENDINGS = ("_scale_2", "_global_scale", "_zero_point")
#: The scales of the inputs and outputs of a module, for the name of its weight: `weight`, `gate_up_proj`.
_ACTIVATIONS = ("input_scale", "input_scale_ub", "input_zero_point", "output_scale", "activation_scale")
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


def is_packed(dtype: str, axes: int) -> bool:
    """Whether a tensor is as quantized weights are: of narrow elements, which may hold several numbers each."""
    return axes > 1 and dtype.startswith((*_NARROW, "int16", "uint16"))


def _scales_of(name: str, dtype: str) -> Iterator[tuple[str, str]]:
    """Yield possible names of a weight's scales, the most specific first, and how the weight would be stored."""
    path, _, own = name.rpartition(".")
    if own.endswith("_blocks") and dtype == "uint8":
        yield joined(path, f"{own.removesuffix('_blocks')}_scales"), "a weight packed by MXFP4"
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


def is_plain_fp8(pair: Scaled, dtypes: Mapping[str, str]) -> bool:
    """Whether the values of a weight are its fp8 elements, each times one number of its scale, and nothing else."""
    if not dtypes[pair.weight].startswith("float8") or dtypes[pair.weight] == "float8_e8m0fnu":
        return False
    if any(pair.weight + ending in dtypes for ending in _FURTHER_ENDINGS):
        return False
    own = pair.scale.rpartition(".")[2]
    return pair.scale in [pair.weight + ending for ending in _PLAIN_ENDINGS] or own in _PLAIN_NAMES


def method_of(pair: Scaled, dtypes: Mapping[str, str], stated: str | None = None) -> str:
    """Return the name of the method that stored a weight which is not plain fp8.

    Args:
        pair: the weight and its scale.
        dtypes: the dtypes of all tensors.
        stated: the method that the configuration beside it names; without one, names and dtypes decide.
    """
    if stated is not None:
        return stated
    path, _, own = pair.weight.rpartition(".")
    if own == "qweight":
        return "GPTQ" if joined(path, "g_idx") in dtypes else "GPTQ or AWQ"
    if own in _PACKED:
        return _PACKED[own][0]
    if own.endswith("_blocks"):
        return "MXFP4"
    if pair.scale.startswith(f"{pair.weight}.") or pair.scale.endswith("SCB"):
        return "bitsandbytes"
    if dtypes[pair.weight] == "uint8" and f"{pair.weight}_scale_2" in dtypes:
        return "NVFP4"
    if dtypes[pair.weight] == "uint8" and dtypes[pair.scale] == "uint8":
        return "MXFP4"
    return f"an unknown method ({dtypes[pair.weight]} elements with {pair.scale.rpartition('.')[2]})"


def activation_scales(weight: str, names: Container[str]) -> list[str]:
    """Return the scales of the inputs and outputs beside a weight, which have no meaning once it has no scale."""
    path, _, own = weight.rpartition(".")
    prefix = "" if own == "weight" else f"{own}_"
    return [name for each in _ACTIVATIONS if (name := joined(path, prefix + each)) in names]
