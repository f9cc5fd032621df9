"""The edits of the working recipe, for the commands `log` and `undo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.errors import RequestError
from modelcli.wording import counted

if TYPE_CHECKING:
    from modelcli.recipe import Recipe


@dataclass(frozen=True)
class UndoRequest:
    """How many of a recipe's last edits to undo; with `dry_run` the recipe does not change."""

    recipe: Path
    count: int = 1
    dry_run: bool = False


def log(path: Path) -> Recipe:
    """Return the recipe. Raises RequestError if it does not exist."""
    from modelcli import recipe

    recipe.require(path)
    return recipe.read(path)


def undo(request: UndoRequest) -> tuple[str, ...]:
    """Remove the last edits of a recipe, and return them in order. Raises RequestError if there are fewer."""
    from modelcli import recipe

    path, count = request.recipe, request.count
    recipe.require(path)
    with recipe.locked(path):
        read = recipe.read(path)
        if not read.edits:
            raise RequestError(f"{path} has no edits to undo")
        if count > len(read.edits):
            raise RequestError(f"{path} has {counted(len(read.edits), 'edit')} to undo, not {count}")
        if not request.dry_run:
            return tuple(recipe.remove_last(path, count))
        return tuple(str(edit) for edit in read.edits[-count:])
