"""What an edit changed: a row a change, the totals, the check, and what was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelcli.edits import kind_called
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import shown
from modelcli.model.totals import Totals
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
    from modelcli.render.folding import Fold


def edits(
    reference: str,
    blueprint: Blueprint,
    *,
    lines: Sequence[str],
    changes: Iterable[Mapping[str, Any]],
    before: Totals,
    after: Totals,
    check: Mapping[str, Any],
    output: str | None,
    outcome: Sequence[tuple[str, str]],
    folded: bool = False,
) -> View:
    """What an edit changed: a row for each change, the totals, the check, and what became of it.

    Where `folded`, the table has one row for the same change of numbered siblings; the document has a row for each.
    """
    rows = [{**change, "path": shown(change["path"])} for change in changes]
    document = {
        "schema": SCHEMA,
        "model": model_of(reference, blueprint),
        "edits": list(lines),
        "changes": rows,
        "totals_before": totals_document(before),
        "totals_after": totals_document(after),
        "check": dict(check),
        "output": output,
    }
    footer = [("params", _difference(before.params, after.params))]
    trained, still = before.trainable_params, after.trainable_params
    if trained is not None and still is not None:
        if before.non_trainable_params or after.non_trainable_params:
            footer.append(("trainable", _difference(trained, still)))
    elif trained is not still:
        footer.append(("trainable", f"{count(trained)} -> {count(still)}"))
    if check["ran"]:
        given = " ".join(shape(size) for size in check["input"])
        footer.append(("check", f"runs: {given} -> {shape(check['output_shape'])}"))
    else:
        footer.append(("check", f"not made: {check['reason']}"))
    shown_rows = [row | {"arrow": "->", "delta": row["params_after"] - row["params_before"]} for row in rows]
    if folded:
        from modelcli.render import folding

        shown_rows = [_folded_change(fold) for fold in folding.folded(shown_rows, "path", _looks_of_change)]
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
        columns.append(Column("delta", "params", _change_of_size, optional=1))  # the totals say it as well
    hidden = len(rows) - len(shown_rows)
    return View(document, shown_rows, columns, [*footer, *outcome], header=False, folded=hidden)


def _looks_of_change(row: Mapping[str, Any]) -> tuple[object, ...]:
    """What a row shows of a change besides its path."""
    keys = ("action", "before", "after", "params_before", "params_after", "bytes_before", "bytes_after")
    return tuple(row.get(key) for key in keys)


def _folded_change(fold: Fold) -> dict[str, Any]:
    """One row for changes that are the same: sizes are those of all of them."""
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
