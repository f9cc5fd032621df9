"""The view of `params`: one row for each tensor, and the totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelcli.model.blueprint import Blueprint
from modelcli.model.tensors import TensorInfo
from modelcli.model.totals import Totals, totals_of
from modelcli.render.documents.common import SCHEMA, model_of, totals_document
from modelcli.render.views import (
    Column,
    Share,
    View,
    count,
    megabytes,
    number,
    path_column,
    percent,
    shape,
)

SORT_KEYS = ("name", "shape", "dtype", "elements", "bytes", "kind")


STATS = ("min", "max", "mean", "std", "zeros", "nan", "inf")


def params(
    reference: str,
    blueprint: Blueprint,
    tensors: Sequence[TensorInfo],
    *,
    values: Mapping[str, Any] | None = None,
    value_texts: Mapping[str, str] | None = None,
    stats: Mapping[str, Mapping[str, Any]] | None = None,
) -> View:
    """Return the view of some tensors, one in each row, and their totals.

    Args:
        reference: the reference of the model.
        blueprint: the model.
        tensors: the tensors to show.
        values: the values of each tensor as JSON values, by its name; None if they are not shown.
        value_texts: the same values as text for a table.
        stats: the statistics of each tensor, by its name; None if they are not shown. A missing statistic is null.
    """
    rows = []
    sizes: dict[tuple[Any, ...], tuple[list[int] | None, int, int]] = {}  # 100,000 tensors have few different ones
    for tensor in tensors:
        alike = (tensor.shape, tensor.dtype, tensor.stored_bytes)
        if (size := sizes.get(alike)) is None:
            listed = None if tensor.shape is None else list(tensor.shape)
            size = sizes[alike] = (listed, tensor.elements, tensor.nbytes)
        row: dict[str, Any] = {
            "name": tensor.name,
            "shape": size[0],
            "dtype": tensor.dtype,
            "elements": size[1],
            "bytes": size[2],
            "kind": tensor.kind,
            "trainable": tensor.requires_grad if tensor.kind == "parameter" else None,
            "tied_to": tensor.tied_to,
        }
        if not tensor.persistent:
            row["persistent"] = False
        if tensor.layout != "strided":
            row["layout"] = tensor.layout
        if values is not None:
            row["values"] = values.get(tensor.name)
        if stats is not None:
            row["stats"] = {key: stats.get(tensor.name, {}).get(key) for key in STATS}
        rows.append(row)
    totals = totals_of(tensors)
    document = {
        "schema": SCHEMA,
        "model": model_of(reference, blueprint),
        "tensors": rows,
        "totals": totals_document(totals),
    }
    columns = [
        path_column("name", "name"),
        Column("shape", "shape", shape, optional=3 if stats is not None else 0),
        Column("dtype", "dtype", optional=4 if stats is not None else 0),
        Column("elements", "elements", count, right=True, optional=5 if stats is not None else 0),
        Column("bytes", "bytes", count, right=True, optional=9),
        Column("kind", "kind", optional=8),
        Column("trainable", "trainable", optional=7),
    ]
    if any(tensor.layout != "strided" for tensor in tensors):
        columns.append(Column("layout", "layout"))
        rows = [{"layout": "strided"} | row for row in rows]
    if any(tensor.tied_to for tensor in tensors):
        columns.append(Column("tied_to", "tied to", optional=6 if stats is not None else 0))
    if stats is not None:
        columns += _stat_columns(rows)
        rows = [row | _stat_cells(row) for row in rows]
    if value_texts is not None:
        columns.append(Column("value_text", "values", flexible=True))
        rows = [row | {"value_text": value_texts.get(row["name"], "-")} for row in rows]
    footer = [
        ("Tensors", count(len(rows))),
        *([("Not finite", _not_finite(rows))] if stats is not None else []),
        ("Params", _params_text(tensors, totals)),
        ("Buffers", count(totals.buffers)),
        ("Size", megabytes(totals.param_bytes + totals.buffer_bytes)),
    ]
    return View(document, rows, columns, footer, dimmed=lambda row: row["trainable"] is False)


def _stat_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return a column for each statistic. A narrow terminal leaves NaN and Inf out if no tensor has any."""
    return [
        *(Column(key, key, number, right=True) for key in ("min", "max", "mean", "std")),
        Column("zeros", "zeros", percent, right=True, optional=1),
        Column("nan", "NaN", count, right=True, optional=0 if any(row["stats"]["nan"] for row in rows) else 2),
        Column("inf", "Inf", count, right=True, optional=0 if any(row["stats"]["inf"] for row in rows) else 2),
    ]


def _stat_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    zeros = row["stats"]["zeros"]
    return {**row["stats"], "zeros": None if zeros is None else Share(zeros, row["elements"])}


def _not_finite(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how many of the tensors contain a NaN or an Inf, as text."""
    return count(sum(bool(row["stats"]["nan"] or row["stats"]["inf"]) for row in rows))


def _params_text(tensors: Sequence[TensorInfo], totals: Totals) -> str:
    """Return the number of parameters as text, with the number of trainable ones if it is known."""
    known = totals.trainable_params is not None and totals.params
    return count(totals.params) + (f" ({count(totals.trainable_params)} trainable)" if known else "")
