"""The view of `load`: how the keys of a checkpoint fit an architecture; and that of a `graft` that is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from modelcli.model.paths import shown
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
    from modelcli.model.state_dict_match import Mismatch


class MatchedKeys(Protocol):
    """How the keys of a state dict fit a model."""

    @property
    def matched(self) -> int: ...

    @property
    def missing(self) -> tuple[str, ...]: ...

    @property
    def unexpected(self) -> tuple[str, ...]: ...

    @property
    def mismatched(self) -> tuple[Mismatch, ...]: ...


def load(result: LoadResult, *, most: int | None = None) -> View:
    """Return the view of how a checkpoint's keys fit an architecture.

    Args:
        result: the matched, missing, unexpected and mismatched keys.
        most: the table has at most this many rows for each kind of problem; None shows all.
    """
    document = {"schema": SCHEMA, "model": model_of(result.reference, result.blueprint), **_keys(result)}
    return _view(document, result, [("recipe", _recipe_text(result))], most)


def graft(source: str, path: str, report: MatchedKeys, *, most: int | None = None) -> View:
    """Return the view of how the keys of another model match those of a module that gets its values.

    Args:
        source: the other model.
        path: the path of the module.
        report: the matched, missing, unexpected and mismatched keys.
        most: as for `load`.
    """
    document = {"schema": SCHEMA, "source": source, "path": shown(path), **_keys(report)}
    return _view(document, report, [], most)


def _keys(report: MatchedKeys) -> dict[str, Any]:
    """Return the keys as the JSON documents have them."""
    return {
        "matched": report.matched,
        "missing": list(report.missing),
        "unexpected": list(report.unexpected),
        "mismatched": [
            {"name": item.name, "expected": list(item.expected), "found": list(item.found)}
            for item in report.mismatched
        ],
    }


def _view(document: dict[str, Any], report: MatchedKeys, footer: list[tuple[str, str]], most: int | None) -> View:
    rows: list[dict[str, Any]] = [
        {"name": item["name"], "problem": "mismatched", "expected": item["expected"], "found": item["found"]}
        for item in document["mismatched"][:most]
    ]
    for problem, names in (("missing", report.missing), ("unexpected", report.unexpected)):
        rows += [{"name": name, "problem": problem, "expected": None, "found": None} for name in names[:most]]
    columns = (
        path_column("name", "name"),
        Column("problem", "problem", style="red"),
        Column("expected", "expected", shape),
        Column("found", "found", shape),
    )
    counts = [
        ("matched", count(report.matched)),
        ("missing", _of_which(len(report.missing), most)),
        ("unexpected", _of_which(len(report.unexpected), most)),
        ("mismatched", _of_which(len(report.mismatched), most)),
    ]
    return View(document, rows, columns, [*counts, *footer], header=bool(rows))


def _recipe_text(result: LoadResult) -> str:
    """Say what happened to the working recipe."""
    if result.recipe is not None:
        return f"{result.recipe} starts with {result.reference}"
    return "not written: the load failed" if result.error is not None else "not written: --dry-run changes nothing"


def _of_which(number: int, most: int | None) -> str:
    """Return `118 (20 above, and 98 more: --json shows all)`, or the number alone if every key has a row."""
    more = f" ({most} above, and {count(number - most)} more: --json shows all)" if most and number > most else ""
    return f"{count(number)}{more}"
