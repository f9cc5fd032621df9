"""The view of `log`: the working recipe, one edit in each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import Column, View, text

if TYPE_CHECKING:
    from modelcli.recipe import Recipe


def log(recipe: Recipe) -> View:
    """Return the view of a recipe: one edit in each row, and the recipe's other lines below."""
    source, lines = recipe.source, [str(edit) for edit in recipe.edits]
    details: dict[str, Any] = {
        "weights": source.weights,
        "arch": source.arch,
        "key": source.key,
        "seed": source.seed,
        "input_size": None if source.input_size is None else [list(size) for size in source.input_size],
        "input_dtype": list(source.input_dtype),
        "inputs": list(source.inputs),
    }
    document = {
        "schema": SCHEMA,
        "recipe": str(recipe.path),
        "model": {"reference": source.model, "class": None},
        **details,
        "edits": lines,
    }
    rows = [{"number": number, "edit": line} for number, line in enumerate(lines, 1)]
    columns = (Column("number", "#", right=True), Column("edit", "edit", flexible=True, cut="middle"))
    footer = [("recipe", str(recipe.path)), ("model", source.model)]
    if sizes := details["input_size"]:
        details["input_size"] = " and ".join(",".join(map(str, size)) for size in sizes)  # as a user writes the option
    footer += [(key, text(value)) for key, value in details.items() if value not in (None, [])]
    return View(document, rows, columns, footer, header=bool(rows))
