"""Edits carried out, checked, and written or recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from modelcli.commands.applied_edits import AppliedEdits, apply_each
from modelcli.commands.editable import Editable, open_editable
from modelcli.commands.fit_check import FitCheck, check_fit, without_traced
from modelcli.commands.look import architecture_notes, stdout_is_for_data
from modelcli.commands.target import Target, notes_of_python
from modelcli.commands.write import Progress, WriteRequest, write
from modelcli.errors import ModelcliError
from modelcli.model.blueprint import Blueprint
from modelcli.model.totals import Totals

if TYPE_CHECKING:
    from modelcli.edits import Edit
    from modelcli.edits.applied import Change
    from modelcli.writing import Written


@dataclass(frozen=True)
class EditRequest:
    """Edits of a model, and what is done with the result. `locations` say where the edits are written, for errors."""

    target: Target
    edits: tuple[Edit, ...]
    write: WriteRequest = field(default_factory=WriteRequest)
    locations: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditResult:
    """An edited model: what it is now, and what changed.

    Attributes:
        reference: the model's reference.
        blueprint: the model after the edits.
        before: the totals before them.
        edits: the edits as lines.
        changes: what they changed at which paths.
        check: whether it still runs.
        written: the file that was written; None where nothing was.
        notes: what there is to say besides.
    """

    reference: str
    blueprint: Blueprint
    before: Totals
    edits: tuple[str, ...]
    changes: tuple[Change, ...]
    check: FitCheck
    written: Written | None = None
    notes: tuple[str, ...] = ()


@stdout_is_for_data
def edit(request: EditRequest, progress: Progress | None = None) -> EditResult:
    """Carry out edits, check the result, and write it where that is asked for; a recipe gets the edits at its end.

    Nothing is written where anything is wrong.
    """
    with request.target.notes_in_errors():
        return _edited(request, progress)


def _edited(request: EditRequest, progress: Progress | None) -> EditResult:
    from modelcli import writing

    target, how = request.target, request.write
    if how.out is not None:
        writing.check_target(how.out, how.format, force=how.force)
    if target.recipe is not None:
        from modelcli import recipe

        recipe.check_append(target.recipe, request.edits)
    model = open_editable(target.source)
    apply_each(model, target.edits, target.locations)  # the notes of a recipe's edits were shown when these were made
    before = model.describe().totals
    applied = apply_each(model, request.edits, request.locations)
    result = checked_and_written(model, before, applied, target, how, progress)
    if target.recipe is None or how.dry_run:
        return result
    from modelcli import recipe

    try:
        recipe.append(target.recipe, request.edits, target.source if target.restates_input else None)
        notes_of_python(target.recipe, target.source, (*target.edits, *request.edits), own=True)
    except ModelcliError as error:
        if result.written is not None:
            error.message += f"; {how.out} was written, but the recipe is unchanged"
        raise
    if target.restates_input:
        note = f"{target.recipe} now records the input that you stated"
        result = replace(result, notes=(*result.notes, note))
    return result


def checked_and_written(
    model: Editable,
    before: Totals,
    applied: AppliedEdits,
    target: Target,
    how: WriteRequest,
    progress: Progress | None = None,
    check: FitCheck | None = None,
) -> EditResult:
    """Check an edited model, unless `check` says already what there is to know, and write it where `how` says so.

    `before` are the totals before the edits that were `applied`, and `target` where to find that one.
    """
    is_written = how.out is not None and not how.dry_run
    check = check or check_fit(model, applied, target, how.check, traced=is_written)
    after = model.describe()
    notes = (*target.notes, *model.notes, *applied.notes, *check.notes, *architecture_notes(model))
    notes = tuple(dict.fromkeys((*notes, *_sum_notes(applied.changes, before, after.totals))))
    written = None
    if is_written:
        result = write(model, applied.changes, how, check.traced, progress)
        written, notes = result.written, (*notes, *result.notes)
    return EditResult(
        target.source.model,
        after,
        before,
        applied.lines,
        applied.changes,
        without_traced(check),
        written,
        notes,
    )


def _sum_notes(changes: Sequence[Change], before: Totals, after: Totals) -> list[str]:
    """Why the rows do not add up to the totals, where they do not: a row counts all that its module holds."""
    rows, total = sum(change.params_after - change.params_before for change in changes), after.params - before.params
    if rows == total:
        return []
    return [f"the rows add up to {rows:+,} params, the totals to {total:+,}: the totals count shared parameters once"]
