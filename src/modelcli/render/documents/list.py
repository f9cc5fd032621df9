"""The view of `list`: the models that providers know by name."""

from __future__ import annotations

from collections.abc import Sequence

from modelcli.providers.published import PublishedModel
from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import Column, View, count, path_column

#: The columns that are left out if no model has a value: not every library publishes these for its models.
_INPUT_SIZE = (Column("input_size", "input", lambda size: "x".join(map(str, size or ())), optional=2),)


def models(models: Sequence[PublishedModel]) -> View:
    """Return the view of models, one in each row."""
    rows = [
        {
            "name": model.name,
            "params": model.params,
            "macs": model.macs,
            "input_size": None if model.input_size is None else list(model.input_size),
            "weights": list(model.weights),
            "group": model.group,
        }
        for model in models
    ]
    columns = (
        path_column("name", "name"),
        Column("params", "params", count, right=True),
        Column("macs", "mult-adds", count, right=True, optional=2),
        *(_INPUT_SIZE if any(model.input_size is not None for model in models) else ()),
        Column("group", "group", optional=3),
        Column("weights", "weights", lambda value: " ".join(value), optional=1),
    )
    return View({"schema": SCHEMA, "models": rows}, rows, columns, [("Builders", count(len(rows)))])
