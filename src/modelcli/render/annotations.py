"""Checks as annotations of a GitHub workflow: commands that it reads from a log, a line each.

https://docs.github.com/actions/reference/workflow-commands-for-github-actions. Every text goes in escaped: a tensor may
be called `::stop-commands::x`, and a line of its own would be obeyed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcli.errors import ModelcliError
from modelcli.render.views import finding


@dataclass(frozen=True)
class CheckedModel:
    """What became of the assertions about one of several models. `error` is set where it could not be looked at."""

    model: str
    checks: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    type: str | None = None
    error: ModelcliError | None = None
    exit_code: int = 0

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """The assertions; of a model that could not be looked at, one that says so."""
        if self.error is None:
            return self.checks
        return ({"check": "open", "passed": False, "found": self.error.message, "wanted": "a model"},)


def of_checks(outcomes: Sequence[CheckedModel]) -> str:
    """An error for each assertion that does not hold, what there is to tell as warnings and notices, and the count."""
    lines = [line for found in outcomes for line in _of_model(found)]
    rows = [row for found in outcomes for row in found.rows]
    passed = sum(row["passed"] for row in rows)
    return "".join(f"{line}\n" for line in (*lines, f"Checks: {passed} of {len(rows)} passed"))


def _of_model(found: CheckedModel) -> Iterator[str]:
    place = {"file": found.model} if Path(found.model).is_file() else {}
    for row in found.rows:
        if not row["passed"]:
            told = f"{found.model}: {finding(row['found'])}; wanted: {finding(row['wanted'])}"
            title = f"modelcli check --{row['check']}"
            if found.error is not None:
                told, title = _of_error(found.model, found.error.message), "modelcli check"
            if "on_record" in row:
                told += f" (the record alone says so: {row['on_record']})"
            yield command("error", told, {**place, "title": title})
    yield from _told("warning", found, found.warnings, place)
    yield from _told("notice", found, found.notes, place)


def _of_error(model: str, message: str) -> str:
    """What is wrong with a model that could not be looked at: most messages name it themselves."""
    return message if model in message else f"{model}: {message}"


def _told(kind: str, found: CheckedModel, texts: Iterable[str], place: Mapping[str, str]) -> Iterator[str]:
    return (command(kind, f"{found.model}: {text}", {**place, "title": "modelcli check"}) for text in texts)


def command(kind: str, message: str, properties: Mapping[str, str]) -> str:
    """`::error file=best.pth,title=...::message`, escaped as GitHub's own toolkit does it."""
    given = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{kind} {given}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
