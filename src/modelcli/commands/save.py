"""Apply the working recipe, check the result and write it."""

from __future__ import annotations

from dataclasses import dataclass

from modelcli.commands.applied_edits import apply_each
from modelcli.commands.edit import EditResult, checked_and_written, rest_unless_shared
from modelcli.commands.editable import open_editable
from modelcli.commands.fit_check import FitCheck
from modelcli.commands.look import stdout_is_for_data
from modelcli.commands.target import Target, without_edits
from modelcli.commands.write import Progress, WriteRequest


@dataclass(frozen=True)
class SaveRequest:
    """A model with its recipe's edits, and how to write it."""

    target: Target
    write: WriteRequest


@stdout_is_for_data
def save(request: SaveRequest, progress: Progress | None = None) -> EditResult:
    """Apply the recipe's edits, check the result and write it."""
    with request.target.notes_in_errors():
        return _saved(request, progress)


def _saved(request: SaveRequest, progress: Progress | None) -> EditResult:
    from modelcli import writing

    target, how = request.target, request.write
    assert how.out is not None
    writing.check_target(how.out, how.format, force=how.force)
    rest_unless_shared(how)
    model = open_editable(target.source, values=not how.dry_run)
    before = model.describe().totals
    applied = apply_each(model, target.edits, target.locations)
    check = None if target.edits else FitCheck(False, "nothing was edited")
    return checked_and_written(model, before, applied, without_edits(target), how, progress, check)
