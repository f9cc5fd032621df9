"""torch's dtypes by name: their element sizes, and which of them are floating-point."""

from __future__ import annotations

from collections.abc import Mapping

#: `itemsize` in bytes of every torch dtype, by its name without `torch.`.
#: An element of `float4_e2m1fn_x2` is one byte with two values. torch gives 1 for `quint4x2` too, which packs elements.
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8", "qint8", "quint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("quint4x2", "quint2x4", "bits8", "bits4x2", "bits2x4", "bits1x8"), 1),
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16", "bits16"), 2),
    **dict.fromkeys(("int32", "uint32", "qint32", "float32", "complex32", "bcomplex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}


#: The floating-point dtypes that values can be converted to. torch converts nothing to `float4_e2m1fn_x2`.
FLOATING = frozenset(
    name for name in ITEM_BYTES if name.startswith(("float", "bfloat")) and not name.startswith("float4")
)


#: The dtypes that a model's input can have. torch cannot make tensors of zeros or random values of the others.
INPUT_DTYPES = frozenset(name for name in ITEM_BYTES if not name.startswith(("q", "float4")))


#: Other names of dtypes: those of PyTorch's methods, and common abbreviations.
_NICKNAMES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "long": "int64",
    "int": "int32",
    "short": "int16",
}


def dtype_called(text: str) -> str:
    """Return torch's name of a dtype written as `torch.bfloat16`, `bf16` or `long`; other texts are unchanged."""
    name = text.removeprefix("torch.")
    return _NICKNAMES.get(name, name)


def is_differentiable(dtype: str) -> bool:
    """Whether torch allows `requires_grad` for a dtype: floating-point and complex dtypes only."""
    return dtype.startswith(("float", "bfloat", "complex", "bcomplex"))
