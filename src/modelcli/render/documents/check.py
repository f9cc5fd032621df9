"""`check`: a row an assertion, about one model or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modelcli.render.documents.common import SCHEMA, error_document
from modelcli.render.views import Column, View, finding, path_column

if TYPE_CHECKING:
    from modelcli.commands.assertions import AssertionResult
    from modelcli.commands.check import CheckedModel, CheckResult


def check(result: CheckResult) -> View:
    """One row an assertion: whether it holds, what was found, and what was wanted."""
    document = {
        "schema": SCHEMA,
        "model": {"reference": result.model, "class": result.class_name},
        "passed": result.passed,
        "checks": [_entry(assertion) for assertion in result.assertions],
    }
    rows = [_row(assertion) for assertion in result.assertions]
    return _view(document, rows, _COLUMNS)


def checks(models: Sequence[CheckedModel]) -> View:
    """The assertions about several models: one row an assertion, with the model that it is about."""
    document = {
        "schema": SCHEMA,
        "passed": all(assertion.passed for found in models for assertion in found.assertions),
        "models": [_model_entry(found) for found in models],
    }
    rows = [{"model": found.model} | _row(assertion) for found in models for assertion in found.assertions]
    return _view(document, rows, (path_column("model", "model"), *_COLUMNS))


_COLUMNS = (
    Column("check", "check", style="cyan"),
    Column("passed", "result", lambda value: "passed" if value else "FAILED"),
    Column("found", "found", finding, flexible=True),
    Column("wanted", "wanted", finding, flexible=True),
)


def _view(document: dict[str, Any], rows: list[dict[str, Any]], columns: Sequence[Column]) -> View:
    passed = sum(row["passed"] for row in rows)
    rows.sort(key=lambda row: bool(row["passed"]))  # what fails is read first
    footer = [("Checks", f"{passed} of {len(rows)} passed")]
    return View(document, rows, columns, footer, alarming=lambda row: not row["passed"])


def _entry(assertion: AssertionResult) -> dict[str, Any]:
    """An assertion as the JSON document has it."""
    entry = {
        "check": assertion.check,
        "passed": assertion.passed,
        "found": assertion.found,
        "wanted": assertion.wanted,
    }
    return entry if assertion.on_record is None else entry | {"on_record": assertion.on_record}


def _row(assertion: AssertionResult) -> dict[str, Any]:
    """An assertion as a table has it: where only a file's record answers, the cell says so."""
    entry = _entry(assertion)
    if assertion.on_record is None:
        return entry
    found = f"{finding(assertion.found)} (only the record in the file says so: {assertion.on_record})"
    return entry | {"found": found}


def _model_entry(found: CheckedModel) -> dict[str, Any]:
    """One of several models as the JSON document has it."""
    result, error = found.result, found.error
    entry = {
        "model": {"reference": found.model, "class": None if result is None else result.class_name},
        "passed": all(assertion.passed for assertion in found.assertions),
        "checks": [] if result is None else [_entry(assertion) for assertion in result.assertions],
    }
    return entry if error is None else entry | {"error": error_document(error)}
