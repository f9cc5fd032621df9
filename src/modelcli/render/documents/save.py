"""`save`: what was written where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelcli.model.blueprint import Blueprint
from modelcli.render.documents.common import SCHEMA, model_of
from modelcli.render.views import (
    Column,
    View,
    megabytes,
)
from modelcli.wording import counted


def save(
    reference: str,
    blueprint: Blueprint,
    *,
    output: str | None,
    kind: str,
    tensors: int,
    nbytes: int | None,
    check: Mapping[str, Any],
) -> View:
    """What was saved where, or would be (`output` and `bytes` are null); `bytes` is the size of the file."""
    document = {
        "schema": SCHEMA,
        "model": model_of(reference, blueprint),
        "output": output,
        "format": kind,
        "tensors": tensors,
        "params": blueprint.totals.params,
        "bytes": nbytes,
        "check": dict(check),
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
