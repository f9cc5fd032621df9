"""Read the header of a safetensors file, which states the dtype, shape and position of each tensor."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from modelcli.checkpoints import limits, record_reading, shapes, strict_json
from modelcli.checkpoints import record as records
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.storage import Identity, Span, identity_of
from modelcli.errors import FileFormatError, SystemFailureError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Shape

#: torch's dtype for each dtype of the format.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
#: Dtypes with less than a byte per element: a name, and the bits of an element. torch has one for two `F4` in a byte.
_SUB_BYTE = {"F4": ("float4_e2m1fn", 4), "F6_E2M3": ("float6_e2m3fn", 6), "F6_E3M2": ("float6_e3m2fn", 6)}
PAIRS = "float4_e2m1fn_x2"


def read(path: Path) -> Contents:
    """Read a safetensors file without its tensors' bytes. Raises FileFormatError if it breaks a rule of the format."""
    identity = identity_of(path)
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            limits.HEADER_BYTES.check(length, f"{path}: its header")
            if 8 + length > identity[0]:
                raise FileFormatError.damaged(
                    str(path), f"its header should have {length:,} bytes, but the file has only {identity[0]:,}"
                )
            raw = file.read(length)
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        header = strict_json.loads(raw, f"{path}: its header")
    except (ValueError, RecursionError) as error:
        raise FileFormatError.damaged(str(path), f"its header is not valid: {error}") from None
    return contents_of(path, header, 8 + length, identity)


def contents_of(path: Path, header: dict[str, Any], start: int, identity: Identity) -> Contents:
    """Return what a header says that its file contains.

    Args:
        path: the file, which is not read.
        header: the header as JSON values.
        start: where the bytes of the tensors begin.
        identity: the identity of the file.

    Raises FileFormatError if the header breaks a rule of the format.
    """
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise FileFormatError.damaged(str(path), "__metadata__ in its header does not consist of texts by name")
    limits.check_names(header, str(path))
    tensors, end = _tensors(path, header, start, identity)
    if end != identity[0]:
        raise FileFormatError.damaged(
            str(path), f"its header describes {end:,} bytes, but the file has {identity[0]:,}"
        )
    found = record_reading.record_in((metadata.pop(records.SAFETENSORS_KEY, None),), path)
    aliases = record_reading.aliases_in(metadata, tensors, found.record)
    tensors |= {name: tensors[first] for name, first in aliases.items()}
    contents = Contents(
        path=path,
        format="safetensors",
        tensors=record_reading.in_order_of(found.record, tensors),
        record=found.record,
        notes=(*found.notes, *_part_notes(path, metadata)),
        texts={name: text for name, text in metadata.items() if name not in aliases},
    )
    return found.completed(contents)


def _part_notes(path: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the note about a file of torch.distributed.checkpoint, whose tensors may be parts of larger ones."""
    if _SHARDING not in metadata:
        return ()
    return (f"one process of torch.distributed.checkpoint wrote {path.name}: its tensors may be parts of larger ones",)


#: The key under which torch.distributed.checkpoint states which part of each tensor a file has.
_SHARDING = "DCP_SHARDING_INFO"


def _tensors(
    path: Path, header: Mapping[str, Any], start: int, identity: Identity
) -> tuple[dict[str, TensorEntry | CompositeEntry], int]:
    """Return the tensors that a header lists, in its order, and the end of the last one in the file.

    The tensors must be contiguous from `start`. Raises FileFormatError that names an entry which breaks a rule.
    """
    if (usual := _tensors_in_order(path, header, start, identity)) is not None:
        return usual
    where, end = f"{path}", start
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    for name, info in sorted(header.items(), key=_begin):
        entry, begin, stop = _entry(path, where, name, info, start, identity)
        if start + begin != end:
            before = end - start
            raise FileFormatError.damaged(
                str(path), f"{name} starts at byte {begin:,}, but the tensor before it ends at {before:,}"
            )
        end = start + stop
        tensors[name] = entry
    return {name: tensors[name] for name in header}, end


def _tensors_in_order(
    path: Path, header: Mapping[str, Any], start: int, identity: Identity
) -> tuple[dict[str, TensorEntry | CompositeEntry], int] | None:
    """Return the same for a header with the tensors in the order of their bytes, as nearly every program writes it.

    Returns None for any other header, or a wrong one. It is fast, because a file may have 100,000 tensors: it checks
    the types of all numbers at once, and each distinct shape once.
    """
    where, end = f"{path}", 0
    tensors: dict[str, TensorEntry | CompositeEntry] = {}
    layouts: dict[Shape, tuple[Shape, Shape, int]] = {}
    try:
        numbers = [info["shape"] for info in header.values()] + [info["data_offsets"] for info in header.values()]
        if not {list} >= set(map(type, numbers)) or not {int} >= set(map(type, chain.from_iterable(numbers))):
            return None
        for name, info in header.items():
            begin, stop = info["data_offsets"]
            dtype, item_bytes = _WHOLE_BYTES[info["dtype"]]
            if (layout := layouts.get(listed := tuple(info["shape"]))) is None:
                shape = shapes.shape(listed, where)
                layout = layouts[listed] = (shape, shapes.row_major(shape), prod(shape))
            shape, stride, elements = layout
            if begin != end or stop != begin + elements * item_bytes:
                return None
            tensors[name] = TensorEntry(shape, dtype, stride, 0, Span(path, start + begin, stop - begin, identity))
            end = stop
    except (KeyError, TypeError, ValueError):
        return None
    return (tensors, start + end) if end <= identity[0] else None


def _begin(item: tuple[str, Any]) -> tuple[int, int]:
    try:
        begin, end, *_ = item[1]["data_offsets"]
        return int(begin), int(end)
    except (TypeError, KeyError, ValueError, OverflowError):
        return 0, 0


#: torch's dtype and the bytes of an element for each of the format's dtypes of whole bytes.
_WHOLE_BYTES = {code: (dtype, ITEM_BYTES[dtype]) for code, dtype in DTYPES.items()}
#: The same with the bits of an element, for all dtypes.
_BITS = {code: (dtype, 8 * ITEM_BYTES[dtype]) for code, dtype in DTYPES.items()} | _SUB_BYTE


def _entry(
    path: Path, where: str, name: str, info: Any, start: int, identity: Identity
) -> tuple[TensorEntry | CompositeEntry, int, int]:
    try:
        code, shape = info["dtype"], shapes.shape(info["shape"], where)
        begin, end = shapes.sizes(info["data_offsets"], where)
        dtype, bits = _BITS[code]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError.damaged(
            str(path), f"the entry for {name!r} in its header is not valid: {error}"
        ) from None
    nbytes, rest = divmod(prod(shape) * bits, 8)
    if rest:
        raise FileFormatError.damaged(
            str(path), f"{name} of shape {list(shape)} and dtype {code} would end inside a byte"
        )
    if end - begin != nbytes:
        raise FileFormatError.damaged(
            str(path),
            f"{name} of shape {list(shape)} needs {nbytes:,} bytes, but its header states {end - begin:,} for it",
        )
    span = Span(path, start + begin, nbytes, identity)
    entry: TensorEntry | CompositeEntry
    if code not in _SUB_BYTE:
        entry = TensorEntry(shape, dtype, shapes.row_major(shape), 0, span)
    elif code == "F4" and shape and shape[-1] % 2 == 0:
        entry = _whole((*shape[:-1], shape[-1] // 2), PAIRS, span)
    else:
        entry = CompositeEntry(shape, dtype, "strided", (_whole((nbytes,), "uint8", span),), nbytes, made_by=None)
    return entry, begin, end


def _whole(shape: Shape, dtype: str, span: Span) -> TensorEntry:
    """Return a contiguous tensor that uses all of a span."""
    return TensorEntry(shape, dtype, shapes.row_major(shape), 0, span)
