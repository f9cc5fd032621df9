"""The view of `script`: the text of a Python script."""

from __future__ import annotations

from modelcli.model.blueprint import Blueprint
from modelcli.render.documents.common import SCHEMA, model_of
from modelcli.render.views import (
    Column,
    View,
)


def script(reference: str, blueprint: Blueprint, text: str) -> View:
    """Return the view of a script: its text, and one row for each of its lines."""
    document = {"schema": SCHEMA, "model": model_of(reference, blueprint), "script": text}
    rows = [{"line": line} for line in text.splitlines()]
    return View(document, rows, [Column("line", "line")], body=text.removesuffix("\n"))
