"""The view of `save`: what was written where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcli.render.documents.common import SCHEMA, model_of
from modelcli.render.documents.edit import check_document
from modelcli.render.views import (
    Column,
    View,
    megabytes,
)
from modelcli.wording import counted

if TYPE_CHECKING:
    from modelcli.commands.edit import EditResult


def save(result: EditResult, kind: str) -> View:
    """Return the view of a saved model.

    Args:
        result: what was saved. If nothing was written (a dry run), `output` and `bytes` are null.
        kind: the name of the format that a dry run would write.
    """
    written, blueprint = result.written, result.blueprint
    kept = sum(tensor.persistent for tensor in blueprint.tensors)
    document = {
        "schema": SCHEMA,
        "model": model_of(result.reference, blueprint),
        "output": None if written is None else written.reference,
        "format": kind if written is None else written.format,
        "tensors": kept if written is None else written.tensors,
        "params": blueprint.totals.params,
        "bytes": None if written is None else written.nbytes,
        "check": check_document(result.check),
    }
    row = {key: document[key] for key in ("output", "format", "tensors", "params", "bytes")}
    columns = (
        Column("output", "output", style="cyan", flexible=True, vital=True, cut="middle"),
        Column("format", "format"),
        Column("tensors", "tensors", lambda value: counted(value, "tensor"), right=True),
        Column("params", "params", lambda value: counted(value, "param"), right=True),
        Column("bytes", "bytes", megabytes, right=True),
    )
    return View(document, [row], columns, header=False)
