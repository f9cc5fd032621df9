"""The view of `load`: how the keys of a checkpoint fit an architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelcli.render.documents.common import SCHEMA, model_of
from modelcli.render.views import (
    Column,
    View,
    count,
    path_column,
    shape,
)

if TYPE_CHECKING:
    from modelcli.commands.load import LoadResult


def load(result: LoadResult, *, most: int | None = None) -> View:
    """Return the view of how a checkpoint's keys fit an architecture.

    Args:
        result: the matched, missing, unexpected and mismatched keys.
        most: the table has at most this many rows for each kind of problem; None shows all.
    """
    mismatched = [
        {"name": item.name, "expected": list(item.expected), "found": list(item.found)} for item in result.mismatched
    ]
    document = {
        "schema": SCHEMA,
        "model": model_of(result.reference, result.blueprint),
        "matched": result.matched,
        "missing": list(result.missing),
        "unexpected": list(result.unexpected),
        "mismatched": mismatched,
    }
    rows: list[dict[str, Any]] = [
        {"name": item["name"], "problem": "mismatched", "expected": item["expected"], "found": item["found"]}
        for item in mismatched[:most]
    ]
    for problem, names in (("missing", result.missing), ("unexpected", result.unexpected)):
        rows += [{"name": name, "problem": problem, "expected": None, "found": None} for name in names[:most]]
    columns = (
        path_column("name", "name"),
        Column("problem", "problem", style="red"),
        Column("expected", "expected", shape),
        Column("found", "found", shape),
    )
    footer = [
        ("matched", count(result.matched)),
        ("missing", _of_which(len(result.missing), most)),
        ("unexpected", _of_which(len(result.unexpected), most)),
        ("mismatched", _of_which(len(result.mismatched), most)),
        ("recipe", _recipe_text(result)),
    ]
    return View(document, rows, columns, footer, header=bool(rows))


def _recipe_text(result: LoadResult) -> str:
    """Say what happened to the working recipe."""
    if result.recipe is not None:
        return f"{result.recipe} starts with {result.reference}"
    return "not written: the load failed" if result.error is not None else "not written: --dry-run changes nothing"


def _of_which(number: int, most: int | None) -> str:
    """Return `118 (20 above, and 98 more: --json shows all)`, or the number alone if every key has a row."""
    more = f" ({most} above, and {count(number - most)} more: --json shows all)" if most and number > most else ""
    return f"{count(number)}{more}"
