"""`list`: the models that providers know."""

from __future__ import annotations

from collections.abc import Sequence

from modelcli.providers.published import PublishedModel
from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import Column, View, count, path_column


def models(models: Sequence[PublishedModel]) -> View:
    """One row a model."""
    rows = [
        {
            "name": model.name,
            "params": model.params,
            "macs": model.macs,
            "weights": list(model.weights),
            "group": model.group,
        }
        for model in models
    ]
    columns = (
        path_column("name", "name"),
        Column("params", "params", count, right=True),
        Column("macs", "mult-adds", count, right=True, optional=2),
        Column("group", "group", optional=3),
        Column("weights", "weights", lambda value: " ".join(value), optional=1),
    )
    return View({"schema": SCHEMA, "models": rows}, rows, columns, [("Builders", count(len(rows)))])
