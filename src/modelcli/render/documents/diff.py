"""The view of `diff`: one row for each difference between two models."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelcli.model.paths import shown
from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import (
    Column,
    View,
    number,
    shape,
    text,
)
from modelcli.wording import counted, is_or_are

if TYPE_CHECKING:
    from modelcli.commands.diff_structure import Comparison, ModuleChange, Side, TensorChange


def diff(a: str, b: str, found: Comparison, *, values: bool, folded: bool = False) -> View:
    """Return the view of what differs between two models: one row for each change, modules before tensors.

    If `folded`, the table has one row for equal changes of numbered siblings. The JSON document has a row for each.
    """
    modules = [_module_entry(change) for change in found.modules]
    tensors = [_tensor_entry(change) for change in found.tensors]
    document = {"schema": SCHEMA, "a": a, "b": b, "same": found.same, "modules": modules, "tensors": tensors}
    rows = [{"kind": "module", "name": row["path"], **row, **_what_differs(row)} for row in modules]
    rows += [{"kind": "tensor", **row} for row in tensors]
    every = len(rows)
    if folded:
        from modelcli.render import folding

        rows = [{**fold.rows[0], "name": fold.path} for fold in folding.fold_rows(rows, "name", _looks_of_difference)]
    has_values = any(change.change == "values" for change in found.tensors)
    columns = [
        Column("name", "name", style="cyan"),
        Column("kind", "kind", optional=1),
        Column("change", "change"),
        Column("before", "before", _side, flexible=True),
        Column("after", "after", _side, flexible=True),
        Column("max_abs_diff", "max abs diff", number, right=True, optional=0 if has_values else 2),
    ]
    if not rows:
        equal = counted(found.equal, "tensor")
        what = "the same" if values else "of the same structure (values were not compared)"
        return View(document, rows, columns, body=f"{a} and {b} are {what}: {equal} {is_or_are(found.equal)} equal")
    footer = [("Modules", _differing(found.modules, "path"))] if modules else []
    differing = _differing(found.tensors, "name")
    footer.append(("Tensors", f"{differing}, {found.equal:,} {is_or_are(found.equal)} equal"))
    largest = max((row for row in found.tensors if row.max_abs_diff is not None), key=_size_of, default=None)
    if largest is not None:
        footer.append(("Largest difference", f"{number(largest.max_abs_diff)} in {largest.name}"))
    return View(document, rows, columns, footer, folded=every - len(rows))


def _module_entry(change: ModuleChange) -> dict[str, Any]:
    return {"path": shown(change.path), "change": change.change, "before": change.before, "after": change.after}


def _tensor_entry(change: TensorChange) -> dict[str, Any]:
    return {
        "name": change.name,
        "change": change.change,
        "before": _json(change.before),
        "after": _json(change.after),
        "max_abs_diff": change.max_abs_diff,
    }


def _json(side: Side) -> Any:
    """Return what one model has as JSON values: shapes become lists."""
    if isinstance(side, str | bool) or side is None:
        return side
    if isinstance(side, tuple):
        return list(side)
    return {"shape": _json(side.shape), "dtype": side.dtype}


def _looks_of_difference(row: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what a row shows besides its name. Rows that agree in this may be folded."""
    return row["kind"], row["change"], _side(row["before"]), _side(row["after"]), number(row.get("max_abs_diff"))


def _what_differs(row: Mapping[str, Any]) -> dict[str, str]:
    """Reduce two configurations to the arguments that differ, because all arguments would fill the columns."""
    if row["change"] != "config":
        return {}
    sides = [_arguments(row[side]) for side in ("before", "after")]
    kept = [
        [argument for argument in side if argument not in other] for side, other in zip(sides, sides[::-1], strict=True)
    ]
    return {side: ", ".join(parts) for side, parts in zip(("before", "after"), kept, strict=True)} if all(kept) else {}


def _arguments(printed: str) -> list[str]:
    """Return the arguments of a printed module, split at the commas outside of inner parentheses."""
    inside = printed.partition("(")[2].removesuffix(")")
    return re.split(r",\s(?![^(\[]*[)\]])", inside)


def _size_of(change: TensorChange) -> float:
    """Return the size of a difference, for sorting. NaN counts as the largest."""
    size = change.max_abs_diff
    return math.inf if size is None or math.isnan(size) else size


def _side(value: Any) -> str:
    """Return one side of a change as text: a shape, a word, a flag, or the shape and dtype of a tensor."""
    if isinstance(value, Mapping):
        return f"{shape(value['shape'])} {value['dtype']}"
    return shape(value) if isinstance(value, list) else text(value)


def _differing(changes: Sequence[ModuleChange] | Sequence[TensorChange], key: str) -> str:
    """Return `12 differ, 2 added, 1 removed`. A module or tensor counts once, however many changes it has."""
    kinds: dict[str, str] = {}
    for change in changes:
        name: str = getattr(change, key)
        kinds[name] = change.change if change.change in ("added", "removed") else "differ"
    counts = Counter(kinds.values())
    parts = [f"{counts[kind]:,} {kind}" for kind in ("differ", "added", "removed") if counts[kind]]
    return (
        ", ".join(part.replace("1 differ", "1 differs") if part == "1 differ" else part for part in parts) or "0 differ"
    )
