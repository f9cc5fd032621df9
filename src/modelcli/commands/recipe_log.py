"""The edits of the working recipe: what `log` shows and `undo` takes back."""

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
    """How many edits to undo at the end of a recipe; with `dry_run` the recipe is unchanged."""

    recipe: Path
    count: int = 1
    dry_run: bool = False


def log(path: Path) -> Recipe:
    """A recipe. Raises RequestError where there is none."""
    from modelcli import recipe

    recipe.require(path)
    return recipe.read(path)


def undo(request: UndoRequest) -> tuple[str, ...]:
    """Take back the last edits of a recipe, and give them in order. Raises RequestError where there are not so many."""
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
