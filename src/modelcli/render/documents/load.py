"""`load`: how the keys of a checkpoint fit an architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelcli.model.blueprint import Blueprint
from modelcli.render.documents.common import SCHEMA, model_of
from modelcli.render.views import (
    Column,
    View,
    count,
    path_column,
    shape,
)


def load(
    reference: str,
    blueprint: Blueprint,
    *,
    matched: int,
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Sequence[Mapping[str, Any]],
    outcome: Sequence[tuple[str, str]],
    most: int | None = None,
) -> View:
    """How a checkpoint's keys fit the architecture; the table has at most so many rows of each kind of problem."""
    document = {
        "schema": SCHEMA,
        "model": model_of(reference, blueprint),
        "matched": matched,
        "missing": list(missing),
        "unexpected": list(unexpected),
        "mismatched": [dict(mismatch) for mismatch in mismatched],
    }
    rows: list[dict[str, Any]] = [
        {"name": item["name"], "problem": "mismatched", "expected": item["expected"], "found": item["found"]}
        for item in mismatched[:most]
    ]
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        rows += [{"name": name, "problem": problem, "expected": None, "found": None} for name in names[:most]]
    columns = (
        path_column("name", "name"),
        Column("problem", "problem", style="red"),
        Column("expected", "expected", shape),
        Column("found", "found", shape),
    )
    footer = [
        ("matched", count(matched)),
        ("missing", _of_which(len(missing), most)),
        ("unexpected", _of_which(len(unexpected), most)),
        ("mismatched", _of_which(len(mismatched), most)),
    ]
    return View(document, rows, columns, [*footer, *outcome], header=bool(rows))


def _of_which(number: int, most: int | None) -> str:
    """`118 (20 above, and 98 more: --json shows all)`; the number alone where all have a row."""
    more = f" ({most} above, and {count(number - most)} more: --json shows all)" if most and number > most else ""
    return f"{count(number)}{more}"
