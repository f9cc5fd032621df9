"""Apply many edits at once: those of a recipe, then those of further lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcli.commands.target import Target, edits_seen_from, find_target, notes_of_python, options_given, with_options
from modelcli.edits import Edit
from modelcli.errors import RequestError
from modelcli.language import references
from modelcli.language.references import Source


@dataclass(frozen=True)
class Batch:
    """Edits to apply together to a model, and the location of each: `-e 1`, `modelcli.toml:5`."""

    target: Target
    edits: tuple[Edit, ...] = ()
    locations: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchRequest:
    """Edits from a recipe and from further lines, and the model to apply them to.

    Attributes:
        recipe: the named recipe, if any.
        lines: the location and the text of each line.
        model: used instead of the recipe's own model, weights, architecture and key.
        options: the command's options about the model, as fields of a `Source`.
        working_recipe: the working recipe, if it is not the usual one. Without `recipe` and `model` the lines are
            applied to it; without lines as well, its own edits are applied.
    """

    recipe: Path | None
    lines: tuple[tuple[str, str], ...]
    model: str | None
    options: Mapping[str, Any]
    working_recipe: Path | None = None


def find_batch(request: BatchRequest) -> Batch:
    """Read edits. Raises RequestError, which names every bad line, before any model is opened."""
    from modelcli import edits, recipe

    recipe_path, lines, model, working_recipe = request.recipe, request.lines, request.model, request.working_recipe
    if recipe_path is None and not lines:
        if model is not None and not (working_recipe or recipe.default_path()).exists():
            raise RequestError(
                "no edits are given", "pass -e EDIT, the path of a recipe, or - to read edits from standard input"
            )
        recipe_path = working_recipe or recipe.default_path()
    elif recipe_path is not None and not recipe_path.exists():
        raise references.missing_file(recipe_path, str(recipe_path))
    problems: list[str] = []
    read: recipe.Recipe | None = None
    made: list[Edit] = []
    try:
        read = None if recipe_path is None else recipe.read(recipe_path, model=model)
    except RequestError as error:
        if not lines:
            raise
        problems.append(str(error))
    try:
        made = edits.parse_all(lines)
    except RequestError as error:
        problems.append(error.message)
    if problems:
        raise RequestError("\n".join(problems))
    if read is None:
        target = find_target(model, request.options, working_recipe)
        return Batch(target, tuple(made), tuple(location for location, _ in lines))
    source = read.source
    if model is not None:
        same = {key: getattr(source, key) for key in ("seed", "input_size", "input_dtype", "inputs")}
        source = Source(model, **same)
    made = [*edits_seen_from(read.edits, read.path.parent, Path()), *made]
    notes = notes_of_python(read.path, source, made)
    target = Target(with_options(source, options_given(request.options)), notes=notes)
    found = Batch(target, tuple(made), (*read.locations, *(location for location, _ in lines)))
    if not found.edits:
        raise RequestError(f"{read.path} has no edits to apply", "modelcli save OUT writes a model as it is")
    return found
