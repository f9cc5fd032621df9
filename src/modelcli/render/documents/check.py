"""The view of `check`: one row for each assertion, about one model or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modelcli.render.documents.common import SCHEMA, error_document
from modelcli.render.views import Column, View, finding, path_column

if TYPE_CHECKING:
    from modelcli.commands.assertions import AssertionResult, OutputDifference
    from modelcli.commands.check import CheckedModel, CheckResult


def check(result: CheckResult) -> View:
    """Return the view of the assertions about one model: whether each passed, what was found and what was expected."""
    document = {
        "schema": SCHEMA,
        "model": {"reference": result.model, "class": result.class_name},
        "passed": result.passed,
        "checks": [_entry(assertion) for assertion in result.assertions],
    }
    rows = [_row(assertion) for assertion in result.assertions]
    return _view(document, rows, _COLUMNS)


def checks(models: Sequence[CheckedModel]) -> View:
    """Return the view of the assertions about several models. Each row has an assertion and its model."""
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
    rows.sort(key=lambda row: bool(row["passed"]))  # failed assertions first
    footer = [("Checks", f"{passed} of {len(rows)} passed")]
    return View(document, rows, columns, footer, alarming=lambda row: not row["passed"])


def _entry(assertion: AssertionResult) -> dict[str, Any]:
    """Return an assertion for the JSON document."""
    entry = {
        "check": assertion.check,
        "passed": assertion.passed,
        "found": assertion.found,
        "wanted": assertion.wanted,
        **_outputs(assertion.outputs),
    }
    return entry if assertion.on_record is None else entry | {"on_record": assertion.on_record}


def _outputs(differs: OutputDifference | None) -> dict[str, Any]:
    """Return how outputs differ, for the JSON document; nothing for an assertion about something else."""
    if differs is None:
        return {}
    first = None if differs.first_module is None else dict(zip(("path", "type"), differs.first_module, strict=True))
    return {"max_abs_diff": differs.max_abs_diff, "first_module": first}


def _row(assertion: AssertionResult) -> dict[str, Any]:
    """Return an assertion for the table. If the answer comes from the file's record alone, the cell says so."""
    entry = _entry(assertion)
    if assertion.on_record is None:
        return entry
    found = f"{finding(assertion.found)} (only the record in the file says so: {assertion.on_record})"
    return entry | {"found": found}


def _model_entry(found: CheckedModel) -> dict[str, Any]:
    """Return one of several models for the JSON document."""
    result, error = found.result, found.error
    entry = {
        "model": {"reference": found.model, "class": None if result is None else result.class_name},
        "passed": all(assertion.passed for assertion in found.assertions),
        "checks": [] if result is None else [_entry(assertion) for assertion in result.assertions],
    }
    return entry if error is None else entry | {"error": error_document(error)}
