"""The results of `check` as annotations of a GitHub workflow: commands in its log, one on each line.

The commands: https://docs.github.com/actions/reference/workflow-commands-for-github-actions. Every text is escaped,
because GitHub would obey a tensor that is called `::stop-commands::x` and stands on a line of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.render.views import finding

if TYPE_CHECKING:
    from modelcli.commands.check import CheckedModel


def of_checks(models: Sequence[CheckedModel]) -> str:
    """Return an error for each assertion that fails, the warnings and notes, and the number of assertions that pass."""
    lines = [line for found in models for line in _of_model(found)]
    assertions = [assertion for found in models for assertion in found.assertions]
    passed = sum(assertion.passed for assertion in assertions)
    return "".join(f"{line}\n" for line in (*lines, f"Checks: {passed} of {len(assertions)} passed"))


def _of_model(found: CheckedModel) -> Iterator[str]:
    place = {"file": found.model} if Path(found.model).is_file() else {}
    for assertion in found.assertions:
        if not assertion.passed:
            message = f"{found.model}: {finding(assertion.found)}; wanted: {finding(assertion.wanted)}"
            title = f"modelcli check --{assertion.check}"
            if found.error is not None:
                message, title = _of_error(found.model, found.error.message), "modelcli check"
            if assertion.on_record is not None:
                message += f" (only the record in the file says so: {assertion.on_record})"
            yield command("error", message, {**place, "title": title})
    yield from _commands("warning", found, found.warnings, place)
    yield from _commands("notice", found, found.notes, place)


def _of_error(model: str, message: str) -> str:
    """Return why a model could not be opened. The model's name goes in front unless the message contains it."""
    return message if model in message else f"{model}: {message}"


def _commands(kind: str, found: CheckedModel, texts: Iterable[str], place: Mapping[str, str]) -> Iterator[str]:
    return (command(kind, f"{found.model}: {text}", {**place, "title": "modelcli check"}) for text in texts)


def command(kind: str, message: str, properties: Mapping[str, str]) -> str:
    """Return `::error file=best.pth,title=...::message`, escaped as GitHub's own toolkit does it."""
    given = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{kind} {given}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
