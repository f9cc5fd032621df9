"""Apply edits, check the result, and write or record it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli import ranks
from modelcli.commands.applied_edits import AppliedEdits, apply_each
from modelcli.commands.editable import Editable, open_editable
from modelcli.commands.fit_check import FitCheck, check_fit, without_traced
from modelcli.commands.look import architecture_notes, stdout_is_for_data
from modelcli.commands.target import Target, edits_seen_from, notes_of_python
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
    """Edits of a model, and how to write the result. `locations` are those of the edits, for errors."""

    target: Target
    edits: tuple[Edit, ...]
    write: WriteRequest = field(default_factory=WriteRequest)
    locations: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditResult:
    """An edited model, and what changed.

    Attributes:
        reference: the model's reference.
        blueprint: the model after the edits.
        before: the totals before them.
        edits: the edits as lines.
        changes: what the edits changed at each path.
        check: whether the model still runs.
        written: the file that was written; None if none was.
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
    """Apply edits, check the result, and write it if requested; a working recipe gets the edits at its end.

    Nothing is written if anything is wrong.
    """
    with request.target.notes_in_errors():
        return _edited(request, progress)


def _edited(request: EditRequest, progress: Progress | None) -> EditResult:
    from modelcli import writing

    target, how = request.target, request.write
    if how.out is not None:
        writing.check_target(how.out, how.format, force=how.force)
    rest_unless_shared(how)
    added = request.edits
    if target.recipe is not None:
        from modelcli import recipe

        added = edits_seen_from(added, Path(), target.recipe.parent)
        recipe.check_append(target.recipe, added)
    model = open_editable(target.source, values=how.out is not None and not how.dry_run)
    apply_each(model, target.edits, target.locations)  # the notes of a recipe's edits were shown when these were made
    before = model.describe().totals
    applied = apply_each(model, request.edits, request.locations)
    result = checked_and_written(model, before, applied, target, how, progress)
    if target.recipe is None or how.dry_run:
        return result
    from modelcli import recipe

    try:
        recipe.append(target.recipe, added, target.source if target.restates_input else None)
        notes_of_python(target.recipe, target.source, (*target.edits, *request.edits), own=True)
    except ModelcliError as error:
        if result.written is not None:
            error.message += f"; {how.out} was written, but the recipe is unchanged"
        raise
    if target.restates_input:
        note = f"{target.recipe} now records the input that you stated"
        result = replace(result, notes=(*result.notes, note))
    return result


def rest_unless_shared(how: WriteRequest) -> None:
    """Leave the work to rank 0 unless several ranks write the result: only a folder has files to share out."""
    from modelcli.checkpoints import formats

    ranks.current().rest_unless(how.out is not None and not how.dry_run and formats.named(how.format).is_folder)


def checked_and_written(
    model: Editable,
    before: Totals,
    applied: AppliedEdits,
    target: Target,
    how: WriteRequest,
    progress: Progress | None = None,
    check: FitCheck | None = None,
) -> EditResult:
    """Check an edited model, unless `check` is given, and write it as `how` says.

    `before` are the totals before the `applied` edits, and `target` is the model before them.
    """
    is_written = how.out is not None and not how.dry_run
    if how.also_ema:
        from modelcli.commands import training_checkpoint

        training_checkpoint.require_copies(model, how)
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
    """Return a note if the rows do not add up to the totals: a row counts all parameters of its module."""
    rows, total = sum(change.params_after - change.params_before for change in changes), after.params - before.params
    if rows == total:
        return []
    return [f"the rows add up to {rows:+,} params, the totals to {total:+,}: the totals count shared parameters once"]
