"""`log`: the working recipe, a row an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import (
    Column,
    View,
    text,
)


def log(reference: str, kind: str | None, recipe: Path, lines: Sequence[str], details: Mapping[str, Any]) -> View:
    """The working recipe, an edit a row."""
    document = {
        "schema": SCHEMA,
        "recipe": str(recipe),
        "model": {"reference": reference, "class": kind},
        **details,
        "edits": list(lines),
    }
    rows = [{"number": number, "edit": line} for number, line in enumerate(lines, 1)]
    columns = (Column("number", "#", right=True), Column("edit", "edit", flexible=True, cut="middle"))
    footer = [("recipe", str(recipe)), ("model", reference)]
    told = dict(details)
    if sizes := told.get("input_size"):
        told["input_size"] = " and ".join(",".join(map(str, size)) for size in sizes)  # as the option is written
    footer += [(key, text(value)) for key, value in told.items() if value not in (None, [], ())]
    return View(document, rows, columns, footer, header=bool(rows))
