"""A checkpoint format: eight bytes of magic, the length of a JSON header, the header, then the tensors' bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcli.checkpoints.format import Candidate, Format, ScriptLine
from modelcli.errors import FileFormatError, SystemFailureError

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents
    from modelcli.checkpoints.layout import Layout
    from modelcli.checkpoints.plan import Plan

MAGIC = b"\x93BLOB\x00\x00\x01"
START = struct.Struct("<8sQ")


class Blob(Format):
    """One file of dense tensors."""

    name = "blob"
    title = "a blob"
    label = "blob"
    suffixes = (".blob", ".blb")
    written_suffixes = (".blob",)
    written_as = "as blob.save writes"
    script_names = frozenset({"blob_tensors"})

    def recognises(self, file: Candidate) -> bool:
        return file.head.startswith(MAGIC)

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints import record_reading, shapes
        from modelcli.checkpoints.contents import Contents
        from modelcli.checkpoints.entries import TensorEntry
        from modelcli.checkpoints.storage import Span
        from modelcli.model.dtypes import ITEM_BYTES

        header, start = header_of(file.path)
        tensors: dict[str, TensorEntry] = {}
        for name, (dtype, sizes, offset) in header["tensors"].items():
            shape = shapes.shape(sizes, f"{file.path}: {name}")
            nbytes = shapes.extent(shape, shapes.row_major(shape)) * ITEM_BYTES[dtype]
            if start + offset + nbytes > file.size:
                raise FileFormatError(f"{file.path} is cut off: {name} ends behind the end of the file")
            span = Span(file.path, start + offset, nbytes, file.identity)
            tensors[name] = TensorEntry(shape, dtype, shapes.row_major(shape), 0, span)
        record, notes = record_reading.record_in((header["record"],), file.path)
        return Contents(
            file.path, self.name, record_reading.in_order_of(record, dict(tensors)), record=record, notes=notes
        )

    def layout(self, plan: Plan) -> Layout:
        from modelcli.checkpoints.layout import HeaderLayout

        header: dict[str, Any] = {"record": plan.record, "tensors": {}}
        runs, end = [], 0
        for name, tensor in plan.tensors.items():
            header["tensors"][name] = tensor.dtype, tensor.shape, end
            runs.append((end, tensor.source))
            end += tensor.source.nbytes
        text = json.dumps(header).encode()
        start = START.size + len(text)
        placed = [(start + offset, source) for offset, source in runs]
        return HeaderLayout(START.pack(MAGIC, len(text)) + text, placed, start + end)

    def verify(self, plan: Plan, path: Path) -> None:
        header, _ = header_of(path)
        if header["tensors"].keys() != plan.tensors.keys():
            raise SystemFailureError("what was read back is not what was written; nothing was changed")

    def script_reads(self, path: str) -> ScriptLine:
        return ScriptLine(f"blob_tensors.load({path})", ("from modelcli_plugin import blob_tensors",))

    def script_writes(self, path: str, value: str) -> ScriptLine:
        return ScriptLine(f"blob_tensors.save({value}, {path})", ("from modelcli_plugin import blob_tensors",))


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and where the tensors start."""
    with path.open("rb") as file:
        _, length = START.unpack(file.read(START.size))
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise FileFormatError(f"{path} is damaged: its header is no JSON: {error}") from None
    return header, START.size + length
