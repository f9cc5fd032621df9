"""The edits of a recipe, carried out on an open model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelcli.commands.target import Target
from modelcli.edits import Edit
from modelcli.errors import ModelcliError, RequestError

if TYPE_CHECKING:
    from modelcli.commands.editable import Editable


def apply_recipe(live: Editable, target: Target) -> None:
    """Apply the edits that stand in a recipe already."""
    apply_each(live, target.edits, target.places)


def apply_each(live: Editable, edits: Sequence[Edit], places: Sequence[str]) -> None:
    """Apply edits in order. Those that cannot be done are told together, each by where it stands and its line.

    Edits after a wrong one are tried on the model without it, so that what is said of them may come from that one.
    """
    wrong: list[ModelcliError] = []
    for edit, place in zip(edits, places, strict=True):
        try:
            live.apply([edit], place=place)
        except ModelcliError as error:
            if place:
                error.message = f"{place}: {str(edit)!r}: {error.message}"
            wrong.append(error)
            if not isinstance(error, RequestError):
                break
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        told = [f"{error.message} ({error.hint})" if error.hint else error.message for error in wrong]
        raise RequestError("\n".join(told), "mend the first one first: the others may come from it")
