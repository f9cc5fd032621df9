"""The view of `summary`: one row for each module with its output shape and multiply-accumulates, and the totals."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import shown
from modelcli.render.documents.common import SCHEMA, TRAINABLE, model_of
from modelcli.render.runs import Runs
from modelcli.render.views import (
    Column,
    Share,
    View,
    bar,
    compact,
    count,
    megabytes,
    path_column,
    shape,
)

#: The columns that a summary can be sorted by: numbers from the largest, paths from A to Z. `mult-adds` means `macs`.
SUMMARY_KEYS = ("params", "macs", "mult-adds", "path")


def summary(
    reference: str,
    blueprint: Blueprint,
    *,
    depth: int | None = None,
    sort: str | None = None,
    folded: bool = False,
    paths: Collection[str] | None = None,
    exact: bool = False,
) -> View:
    """Return the view of a summary: each module with its output shape and multiply-accumulates, and the totals.

    Args:
        reference: the reference of the model.
        blueprint: the model, with the trace of a forward pass.
        depth: the largest depth of a module to show; None for no limit.
        sort: one of SUMMARY_KEYS, or None for the model's own order.
        folded: whether the table has one row for each run of siblings that look the same, with the sums over the run.
            The JSON document has a row for each module in any case.
        paths: the modules to show; None for all. The totals are always those of the whole model.
        exact: whether a terminal shows every digit of large numbers, instead of three digits.
    """
    trace = blueprint.trace
    assert trace is not None
    made = trace.reason is None or bool(trace.layers)  # without a forward pass, nothing is known about any module
    by_path = {}
    unseen = frozenset(trace.unseen)
    for module in blueprint.modules:
        if (depth is None or module.depth <= depth) and (paths is None or module.path in paths):
            ran = trace.layers.get(module.path)
            by_path[module.path] = {
                "path": shown(module.path),
                "type": module.type,
                "depth": module.depth,
                "output_shape": ran.output_shape if ran else None,
                "params": blueprint.params_of(module.path),
                "trainable": blueprint.trainable_of(module.path),
                "macs": ran.macs if ran else None,
                "executed": None if module.path in unseen or not made else ran is not None,
                "shared_with": module.shared_with,
            }
    layers = _sorted_layers(by_path.values(), sort)
    rows = _sorted_layers(_folded_layers(blueprint, by_path, depth), sort) if folded and paths is None else layers
    on_screen = None if exact else compact
    totals = blueprint.totals
    parts = (trace.input_bytes, trace.forward_backward_bytes, totals.param_bytes, totals.buffer_bytes)
    known = [part for part in parts if part is not None]
    document = {
        "schema": SCHEMA,
        "model": model_of(reference, blueprint),
        "input": None if trace.inputs is None else [list(size) for size in trace.inputs],
        "layers": layers,
        "totals": {
            "params": totals.params,
            "trainable_params": totals.trainable_params,
            "non_trainable_params": totals.non_trainable_params,
            "buffers": totals.buffers,
            "macs": trace.macs,
            "param_bytes": totals.param_bytes,
            "buffer_bytes": totals.buffer_bytes,
            "input_bytes": trace.input_bytes,
            "forward_backward_bytes": trace.forward_backward_bytes,
            "total_bytes": sum(known) if len(known) == len(parts) else None,
        },
        "reason": trace.reason,
        "device": trace.device,
        "uncounted": list(trace.uncounted),
    }
    return View(
        document,
        [
            row
            | {
                "output_shape": _output_text(row, passed=trace.reason is None),
                "share": Share(row["params"], totals.params),
            }
            for row in rows
        ],
        (
            path_column("path", "path"),
            Column("type", "type", flexible=True, spare=1),
            Column("output_shape", "output shape", flexible=True, spare=2),
            Column("params", "params", count, right=True, screen_format=on_screen),
            Column("share", "share", bar, optional=2, on_screen=True),
            _trainable_column(rows),
            Column("macs", "mult-adds", count, right=True, screen_format=on_screen),
        ),
        _summary_footer(document, trace.reason),
        nested=sort is None and paths is None,
        dimmed=lambda row: trace.reason is None and row["executed"] is False,
        folded=len(layers) - len(rows),
    )


def _trainable_column(rows: Sequence[Mapping[str, Any]]) -> Column:
    """Return the column that says which modules are trainable.

    A narrow terminal leaves it out if all are, because the totals show that too.
    """
    some_are_frozen = any(row["trainable"] in (False, "partial") for row in rows)
    return replace(TRAINABLE, optional=0 if some_are_frozen else 1)


def _folded_layers(
    blueprint: Blueprint, layers: Mapping[str, dict[str, Any]], depth: int | None
) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a summary, one for each run: what its modules have in common, and the sums over them."""
    runs = Runs(blueprint, traced=True)
    for run in runs.below(depth=depth):
        first = layers[run.first]
        macs = [layers[path]["macs"] for path in run.paths]
        yield first | {
            "path": run.path,
            "type": run.counted(first["type"]),
            "params": runs.params_of(run),
            "macs": None if None in macs else sum(macs),
        }


def _sorted_layers(rows: Iterable[dict[str, Any]], key: str | None) -> list[dict[str, Any]]:
    if key is None:
        return list(rows)
    if key == "path":
        return sorted(rows, key=lambda row: row["path"])
    key = "macs" if key == "mult-adds" else key
    return sorted(rows, key=lambda row: -1 if row[key] is None else row[key], reverse=True)


def _output_text(layer: Mapping[str, Any], *, passed: bool) -> str:
    """Return the output shape as text, or `(not called)` if the forward pass did not call the module."""
    return "(not called)" if layer["executed"] is False and passed else shape(layer["output_shape"])


def _summary_footer(document: Mapping[str, Any], reason: str | None) -> list[tuple[str, str]]:
    totals = document["totals"]
    lower_bound = document["uncounted"] and totals["macs"] is not None
    lines = [
        ("Total params", count(totals["params"])),
        ("Trainable params", count(totals["trainable_params"])),
        ("Non-trainable params", count(totals["non_trainable_params"])),
        ("Buffers", count(totals["buffers"])),
        ("Total mult-adds", f"at least {count(totals['macs'])}" if lower_bound else count(totals["macs"])),
        ("Input size", megabytes(totals["input_bytes"])),
        ("Forward/backward pass size", megabytes(totals["forward_backward_bytes"])),
        ("Params size", megabytes(totals["param_bytes"])),
        ("Buffers size", megabytes(totals["buffer_bytes"])),
        ("Estimated total size", megabytes(totals["total_bytes"])),
    ]
    if document["input"] is not None:
        lines.insert(0, ("Input", " ".join(shape(size) for size in document["input"])))
    if reason is not None:
        lines.insert(0, ("Not complete", reason))
    return lines
