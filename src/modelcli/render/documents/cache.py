"""`cache`: where blueprints are kept, and how much room they take."""

from __future__ import annotations

from pathlib import Path

from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import (
    Column,
    View,
    megabytes,
)
from modelcli.wording import counted


def cache(folder: Path, entries: int, nbytes: int) -> View:
    """Where blueprints are kept, and what they take."""
    row = {"path": str(folder), "entries": entries, "bytes": nbytes}
    columns = (
        Column("path", "path", style="cyan", flexible=True, vital=True, cut="middle"),
        Column("entries", "entries", lambda value: counted(value, "entry", "entries"), right=True),
        Column("bytes", "bytes", megabytes, right=True),
    )
    return View({"schema": SCHEMA, **row}, [row], columns, header=False)
