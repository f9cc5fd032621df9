"""The view of an edit: one row for each change, the totals, the check before writing, and what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelcli.edits import kind_called
from modelcli.model.paths import shown
from modelcli.render.documents.common import SCHEMA, model_of, totals_document
from modelcli.render.views import (
    Bytes,
    Column,
    View,
    count,
    megabytes,
    path_column,
    shape,
    signed,
)
from modelcli.wording import counted

if TYPE_CHECKING:
    from modelcli.commands.edit import EditResult
    from modelcli.commands.fit_check import FitCheck
    from modelcli.edits.applied import Change
    from modelcli.live.same_outputs import SameOutputs
    from modelcli.render.folding import Fold


def edits(
    result: EditResult, outcome: Sequence[tuple[str, str]] = (), *, folded: bool = False, with_edits: bool = False
) -> View:
    """Return the view of what edits changed.

    Args:
        result: the result of the edits.
        outcome: labels and texts that follow the totals and the check in the footer: what was written where.
        folded: whether the table has one row for equal changes of numbered siblings. The JSON document has a row for
            each.
        with_edits: whether the edits are shown as lines above the table.
    """
    rows = [_change(change) for change in result.changes]
    before, after, check = result.before, result.blueprint.totals, result.check
    document = {
        "schema": SCHEMA,
        "model": model_of(result.reference, result.blueprint),
        "edits": list(result.edits),
        "changes": rows,
        "totals_before": totals_document(before),
        "totals_after": totals_document(after),
        "check": check_document(check),
        "output": None if result.written is None else result.written.reference,
    }
    footer = [("params", _difference(before.params, after.params))]
    trained, still = before.trainable_params, after.trainable_params
    if trained is not None and still is not None:
        if before.non_trainable_params or after.non_trainable_params:
            footer.append(("trainable", _difference(trained, still)))
    elif trained is not still:
        footer.append(("trainable", f"{count(trained)} -> {count(still)}"))
    if check.ran:
        given = " ".join(shape(list(size)) for size in check.inputs or ())
        footer.append(("check", f"runs: {given} -> {shape(check.output_shape)}"))
        if check.same is not None:
            footer.append(("outputs", f"those of the unedited model, {check.same.difference}"))
    else:
        footer.append(("check", f"not made: {check.reason}"))
    shown_rows = [row | {"arrow": "->", "delta": row["params_after"] - row["params_before"]} for row in rows]
    if folded:
        from modelcli.render import folding

        shown_rows = [_folded_change(fold) for fold in folding.fold_rows(shown_rows, "path", _looks_of_change)]
    for row in shown_rows:
        if "bytes_before" in row:
            row["delta"] = Bytes(row["bytes_before"], row["bytes_after"])
    columns = [
        path_column("path", "path"),
        Column("before", "before", flexible=True, cut="middle"),
        Column("arrow", ""),
        Column("after", "after", flexible=True, cut="middle"),
    ]
    if all(kind_called(row["action"]).changes_flags_only for row in rows):
        columns.append(Column("params_after", "params", lambda value: counted(value, "param"), right=True, optional=1))
    else:
        columns.append(Column("delta", "params", _change_of_size, optional=1))  # the totals show it too
    hidden = len(rows) - len(shown_rows)
    return View(
        document,
        shown_rows,
        columns,
        [*footer, *outcome],
        header=False,
        above=result.edits if with_edits else (),
        folded=hidden,
    )


def _change(change: Change) -> dict[str, Any]:
    """Return a change for the JSON document."""
    row = {
        "path": shown(change.path),
        "action": change.action,
        "before": change.before,
        "after": change.after,
        "params_before": change.params_before,
        "params_after": change.params_after,
    }
    return row if change.nbytes is None else row | {"bytes_before": change.nbytes[0], "bytes_after": change.nbytes[1]}


def check_document(check: FitCheck) -> dict[str, Any]:
    """Return the check before writing for a JSON document."""
    document = {
        "ran": check.ran,
        "reason": check.reason,
        "output_shape": check.output_shape,
        "input": None if check.inputs is None else [list(size) for size in check.inputs],
    }
    return document if check.same is None else document | {"same": _same_document(check.same)}


def _same_document(same: SameOutputs) -> dict[str, Any]:
    """Return the comparison with the outputs of the unedited model for a JSON document."""
    return {
        "bit_for_bit": same.is_bit_for_bit,
        "max_abs_diff": same.max_abs_diff,
        "outputs": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "max_abs_diff": tensor.max_abs_diff,
                "tolerance": tensor.tolerance,
            }
            for tensor in same.tensors
        ],
    }


def _looks_of_change(row: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what a row shows besides its path. Rows that agree in this may be folded."""
    keys = ("action", "before", "after", "params_before", "params_after", "bytes_before", "bytes_after")
    return tuple(row.get(key) for key in keys)


def _folded_change(fold: Fold) -> dict[str, Any]:
    """Return one row for equal changes, with the sum of their sizes."""
    first, number = fold.rows[0], len(fold.rows)
    sizes = {key: value * number for key, value in first.items() if type(value) is int}
    before = first["before"] if number == 1 else f"{number} x {first['before']}"
    return {**first, **sizes, "path": fold.path, "before": before}


def _change_of_size(value: int | Bytes) -> str:
    if isinstance(value, Bytes):
        return f"{megabytes(value.before)} -> {megabytes(value.after)}"
    return f"{signed(value)} params" if value else "same size"


def _difference(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,} ({after - before:+,})"
