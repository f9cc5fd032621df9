"""`list`: the builders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import Column, View, count, path_column

if TYPE_CHECKING:
    from modelcli.commands.list import Builder


def models(builders: Sequence[Builder]) -> View:
    """One row a builder."""
    rows = [
        {
            "name": builder.name,
            "params": builder.params,
            "macs": builder.macs,
            "weights": list(builder.weights),
            "group": builder.group,
        }
        for builder in builders
    ]
    columns = (
        path_column("name", "name"),
        Column("params", "params", count, right=True),
        Column("macs", "mult-adds", count, right=True, optional=2),
        Column("group", "group", optional=3),
        Column("weights", "weights", lambda value: " ".join(value), optional=1),
    )
    return View({"schema": SCHEMA, "models": rows}, rows, columns, [("Builders", count(len(rows)))])
