"""torch's dtypes by their names: how many bytes an element takes, and which are floating-point."""

from __future__ import annotations

from collections.abc import Mapping

#: `itemsize` of every dtype of torch, by its name without `torch.`.
#: `float4_e2m1fn_x2` has two numbers in an element of one byte; elements of `quint4x2` share bytes all the same.
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


#: The floating-point dtypes that numbers can be converted to: `float4_e2m1fn_x2` has two in an element, and none can.
FLOATING = frozenset(
    name for name in ITEM_BYTES if name.startswith(("float", "bfloat")) and not name.startswith("float4")
)


#: The dtypes that a model's input can have: of the others torch cannot make a tensor of zeros or of random values.
INPUT_DTYPES = frozenset(name for name in ITEM_BYTES if not name.startswith(("q", "float4")))


#: What PyTorch's own methods, and people, call them.
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
    """The name of a dtype that is called `torch.bfloat16`, `bf16` or `long`; what is none comes back as it is."""
    name = text.removeprefix("torch.")
    return _NICKNAMES.get(name, name)


def is_differentiable(dtype: str) -> bool:
    """Whether torch lets a tensor of a dtype have a gradient: one of whole numbers has none."""
    return dtype.startswith(("float", "bfloat", "complex", "bcomplex"))
