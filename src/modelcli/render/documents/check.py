"""`check`: a row an assertion, about one model or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelcli.model.blueprint import Blueprint
from modelcli.render.documents.common import SCHEMA, error_document, model_of
from modelcli.render.views import (
    Column,
    View,
    finding,
    path_column,
)

if TYPE_CHECKING:
    from modelcli.render.annotations import CheckedModel


def check(reference: str, blueprint: Blueprint, checks: Sequence[Mapping[str, Any]]) -> View:
    """One row an assertion: whether it holds, what was found, and what was wanted.

    A row with `on_record` says why a file's record alone answers it.
    """
    passed = sum(row["passed"] for row in checks)
    document = {
        "schema": SCHEMA,
        "model": model_of(reference, blueprint),
        "passed": passed == len(checks),
        "checks": [dict(row) for row in checks],
    }
    rows = sorted(map(_with_basis, checks), key=lambda row: bool(row["passed"]))  # what fails is read first
    footer = [("Checks", f"{passed} of {len(checks)} passed")]
    return View(document, rows, _CHECK_COLUMNS, footer, alarming=lambda row: not row["passed"])


_CHECK_COLUMNS = (
    Column("check", "check", style="cyan"),
    Column("passed", "result", lambda value: "passed" if value else "FAILED"),
    Column("found", "found", finding, flexible=True),
    Column("wanted", "wanted", finding, flexible=True),
)


def _with_basis(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a table has it: what a file's record alone says is told as that."""
    if "on_record" not in row:
        return dict(row)
    why = row["on_record"]
    return dict(row) | {"found": f"{finding(row['found'])} (the record says so, and nothing else: {why})"}


def checks(outcomes: Sequence[CheckedModel]) -> View:
    """The assertions about several models: one row an assertion, with the model that it is about."""
    rows = [{"model": found.model} | _with_basis(row) for found in outcomes for row in found.rows]
    passed = sum(row["passed"] for row in rows)
    document = {
        "schema": SCHEMA,
        "passed": passed == len(rows),
        "models": [
            {
                "model": {"reference": found.model, "class": found.type},
                "passed": all(row["passed"] for row in found.rows),
                "checks": [dict(row) for row in found.checks],
                **({} if found.error is None else {"error": error_document(found.error)}),
            }
            for found in outcomes
        ],
    }
    columns = (path_column("model", "model"), *_CHECK_COLUMNS)
    rows.sort(key=lambda row: bool(row["passed"]))  # what fails is read first
    footer = [("Checks", f"{passed} of {len(rows)} passed")]
    return View(document, rows, columns, footer, alarming=lambda row: not row["passed"])
