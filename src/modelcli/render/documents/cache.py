"""The view of `cache`: the folder of the cached blueprints, and their number and size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import (
    Column,
    View,
    megabytes,
)
from modelcli.wording import counted

if TYPE_CHECKING:
    from modelcli.commands.cache import CacheState


def cache(found: CacheState) -> View:
    """Return the view of the cache: its folder, the number of blueprints in it, and their size in bytes."""
    row = {"path": str(found.folder), "entries": found.entries, "bytes": found.nbytes}
    columns = (
        Column("path", "path", style="cyan", flexible=True, vital=True, cut="middle"),
        Column("entries", "entries", lambda value: counted(value, "entry", "entries"), right=True),
        Column("bytes", "bytes", megabytes, right=True),
    )
    return View({"schema": SCHEMA, **row}, [row], columns, header=False)
