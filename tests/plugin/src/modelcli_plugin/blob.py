"""A checkpoint format: eight bytes of magic, the length of a JSON header, the header, then the tensors' bytes.

The header lists every tensor with its dtype, its shape and where its bytes begin behind the header. The bytes lie one
tensor behind the other without a hole, and those of a tied tensor once: all its names begin at one place.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcli.checkpoints.format import Candidate, Format, ScriptLine
from modelcli.errors import FileFormatError, RequestError, SystemFailureError

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents
    from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
    from modelcli.checkpoints.layout import Layout
    from modelcli.checkpoints.plan import Plan

MAGIC = b"\x93BLOB\x00\x00\x01"
START = struct.Struct("<8sQ")
#: By torch's names: all that are not quantized or packed.
DTYPES = frozenset(
    (
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
        *("bool", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
)
_IMPORTS = ("from modelcli_plugin import blob_tensors",)


class Blob(Format):
    """One file of dense tensors."""

    name = "blob"  # Contents.format, and "format" in --json
    title = "a blob"  # "--key is for training checkpoints, and v.blob is a blob"
    label = "blob"  # "epoch is not a tensor, but blob stores only tensors"
    suffixes = (".blob", ".blb")  # words on the command line that are files, and what completion offers
    written_suffixes = (".blob",)  # what -o and save take; leave it out for a format that is only read
    written_as = "as blob.save writes"  # behind these suffixes in a hint
    script_names = frozenset({"blob_tensors"})

    def recognises(self, file: Candidate) -> bool:
        return file.head.startswith(MAGIC)

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints import limits, record_reading
        from modelcli.checkpoints.contents import Contents

        header, start = _header(file)
        limits.check_names(header["tensors"], str(file.path))
        tensors = _tensors(file, header["tensors"], start)
        found = record_reading.record_in((header.get("record"),), file.path)
        tensors = record_reading.in_order_of(found.record, tensors)
        contents = Contents(file.path, self.name, tensors, record=found.record, notes=found.notes)
        return found.completed(contents)

    def layout(self, plan: Plan) -> Layout:
        import json

        from modelcli.checkpoints import formats
        from modelcli.checkpoints.layout import HeaderLayout

        for name, tensor in plan.tensors.items():
            if tensor.dtype not in DTYPES:
                raise RequestError(f"{name} is {tensor.dtype}, which a blob cannot hold", formats.instead())
        places: dict[str, int] = {}
        runs, end = [], 0
        for name, first in plan.first_names.items():
            if name == first:
                places[name] = end
                runs.append((end, plan.tensors[name].source))
                end += plan.tensors[name].source.nbytes
        listed = {name: (t.dtype, t.shape, places[plan.first_names[name]]) for name, t in plan.tensors.items()}
        try:
            text = json.dumps({"record": plan.record, "tensors": listed}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RequestError("a name in it is no valid text, which a blob needs", formats.instead()) from None
        start = START.size + len(text)
        placed = [(start + offset, source) for offset, source in runs if source.nbytes]
        return HeaderLayout(START.pack(MAGIC, len(text)) + text, placed, start + end)

    def verify(self, plan: Plan, path: Path) -> None:
        try:
            found = self.read(Candidate(path), None).tensors
        except FileFormatError as error:
            raise SystemFailureError(f"what was written cannot be read back: {error.message}") from None
        if {name: (t.dtype, t.shape) for name, t in found.items()} != {
            name: (t.dtype, t.shape) for name, t in plan.tensors.items()
        }:
            raise SystemFailureError("what was read back is not what was written; nothing was changed")

    def script_reads(self, path: str) -> ScriptLine:
        return ScriptLine(f"blob_tensors.load({path})", _IMPORTS)

    def script_writes(self, path: str, value: str) -> ScriptLine:
        return ScriptLine(f"blob_tensors.save({value}, {path})", _IMPORTS)


def _header(file: Candidate) -> tuple[dict[str, Any], int]:
    """The header of a file, and where the tensors start."""
    from modelcli.checkpoints import limits, strict_json

    try:
        with file.path.open("rb") as opened:
            _, length = START.unpack(opened.read(START.size))
            limits.HEADER_BYTES.check(length, f"{file.path}: its header")
            if START.size + length > file.size:
                raise FileFormatError(f"{file.path} is cut off inside its header")
            header = strict_json.loads(opened.read(length), f"{file.path}: its header")
    except struct.error:
        raise FileFormatError(f"{file.path} is cut off before its header") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file.path}: its header is not what a blob has: {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("tensors"), dict):
        raise FileFormatError(f"{file.path}: its header lists no tensors")
    return header, START.size + length


def _tensors(file: Candidate, listed: dict[str, Any], start: int) -> dict[str, TensorEntry | CompositeEntry]:
    """The tensors that a header lists; those that begin at one place are one tensor."""
    from modelcli.checkpoints import shapes
    from modelcli.checkpoints.entries import TensorEntry
    from modelcli.checkpoints.storage import Span

    found: dict[str, TensorEntry | CompositeEntry] = {}
    spans: dict[int, tuple[Span, object]] = {}
    for name, described in listed.items():
        dtype, shape, offset, nbytes = _described(file, name, described)
        span = Span(file.path, start + offset, nbytes, file.identity)
        if nbytes:
            span, first = spans.setdefault(offset, (span, described))
            if first != described:
                raise FileFormatError(f"{file.path}: {name} begins where another tensor of another kind does")
        found[name] = TensorEntry(shape, dtype, shapes.row_major(shape), 0, span)
    end = start
    for _, (span, _) in sorted(spans.items()):
        if span.offset != end:
            raise FileFormatError(
                f"{file.path}: a tensor begins at byte {span.offset:,}, the one before ends at {end:,}"
            )
        end += span.nbytes
    if end != file.size:
        raise FileFormatError(f"{file.path}: its header tells of {end:,} bytes, and the file has {file.size:,}")
    return found


def _described(file: Candidate, name: str, described: Any) -> tuple[str, tuple[int, ...], int, int]:
    """The dtype, shape and offset of a tensor as the header states them, and how many bytes it needs."""
    from modelcli.checkpoints import shapes
    from modelcli.model.dtypes import ITEM_BYTES

    try:
        dtype, sizes, offset = described
        shape = shapes.shape(sizes, f"{file.path}: {name}")
        (offset,) = shapes.sizes([offset], f"{file.path}: {name}")
        if dtype not in DTYPES:
            raise ValueError(f"{dtype!r} is no dtype of a blob")
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{file.path}: what its header says of {name!r} is wrong: {error}") from None
    return dtype, shape, offset, shapes.extent(shape, shapes.row_major(shape)) * ITEM_BYTES[dtype]
