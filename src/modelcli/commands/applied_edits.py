"""Apply edits to an open model, one after another, and return what each changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcli.errors import ModelcliError, RequestError

if TYPE_CHECKING:
    from modelcli.commands.editable import Editable
    from modelcli.edits import Edit
    from modelcli.edits.applied import Change


@dataclass(frozen=True)
class AppliedEdit:
    """An edit that was applied, and what it changed.

    `location` is where it is written: `-e 1`, `modelcli.toml:5`; empty if it is the command itself.
    """

    edit: Edit
    location: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AppliedEdits:
    """The edits that were applied together, in order."""

    edits: tuple[AppliedEdit, ...] = ()

    @property
    def changes(self) -> tuple[Change, ...]:
        return tuple(change for applied in self.edits for change in applied.changes)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for applied in self.edits for note in applied.notes)

    @property
    def lines(self) -> tuple[str, ...]:
        """The edits as they were written."""
        return tuple(str(applied.edit) for applied in self.edits)


def apply_each(model: Editable, edits: Sequence[Edit], locations: Sequence[str] = ()) -> AppliedEdits:
    """Apply edits in order. One error names all wrong edits, each with its location and line.

    Edits after a wrong one are tried on the model without it, so their errors may result from it.
    """
    applied: list[AppliedEdit] = []
    wrong: list[ModelcliError] = []
    for edit, location in zip(edits, locations or [""] * len(edits), strict=True):
        try:
            done = model.apply([edit])
        except ModelcliError as error:
            if location:
                error.message = f"{location}: {str(edit)!r}: {error.message}"
            wrong.append(error)
            if not isinstance(error, RequestError):
                break
        else:
            applied.append(AppliedEdit(edit, location, tuple(done.changes), tuple(done.notes)))
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        lines = [f"{error.message} ({error.hint})" if error.hint else error.message for error in wrong]
        raise RequestError("\n".join(lines), "correct the first error first: it may cause the others")
    return AppliedEdits(tuple(applied))
