"""`list`: the builders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import (
    Column,
    View,
    count,
    path_column,
)


def models(entries: Sequence[Mapping[str, Any]]) -> View:
    """The torchvision builders."""
    document = {"schema": SCHEMA, "models": [dict(entry) for entry in entries]}
    columns = (
        path_column("name", "name"),
        Column("params", "params", count, right=True),
        Column("macs", "mult-adds", count, right=True, optional=2),
        Column("group", "group", optional=3),
        Column("weights", "weights", lambda value: " ".join(value), optional=1),
    )
    return View(document, list(entries), columns, [("Builders", count(len(entries)))])
