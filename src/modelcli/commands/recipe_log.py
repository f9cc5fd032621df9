"""The edits of the working recipe: what `log` shows and `undo` takes back."""

from __future__ import annotations

from pathlib import Path

from modelcli.errors import RequestError
from modelcli.wording import counted


def undo(path: Path, count: int, *, dry_run: bool = False) -> list[str]:
    """Take back the last edits of a recipe. Raises RequestError where there are none."""
    from modelcli import recipe

    recipe.require(path)
    with recipe.locked(path):
        read = recipe.read(path)
        if not read.edits:
            raise RequestError(f"{path} has no edits to take back")
        if count > len(read.edits):
            raise RequestError(f"{path} has {counted(len(read.edits), 'edit')} to take back, not {count}")
        if dry_run:
            return [str(edit) for edit in read.edits[-count:]]
        return recipe.take_back(path, count)
