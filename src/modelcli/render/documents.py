"""Blueprints and results as views: the JSON documents of the contract, key by key, with their tables."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcli.errors import ModelcliError
from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.paths import lies_in, shown
from modelcli.model.printed import repr_text
from modelcli.model.tensors import TensorInfo
from modelcli.model.totals import Totals, totals_of
from modelcli.render.runs import Run, Runs
from modelcli.render.views import (
    Branch,
    Bytes,
    Column,
    Share,
    View,
    bar,
    compact,
    count,
    finding,
    megabytes,
    number,
    path_column,
    percent,
    shape,
    signed,
    text,
)
from modelcli.wording import counted, listed

if TYPE_CHECKING:
    from modelcli.commands.differences import Comparison, ModuleChange, TensorChange
    from modelcli.model.state_dict_match import Match
    from modelcli.render.annotations import CheckedModel
    from modelcli.render.folding import Fold

SCHEMA = 1


def model_of(reference: str, blueprint: Blueprint) -> dict[str, Any]:
    """The `model` of every document."""
    return {"reference": reference, "class": blueprint.root.type}


def totals_document(totals: Totals) -> dict[str, Any]:
    return {
        "params": totals.params,
        "trainable_params": totals.trainable_params,
        "non_trainable_params": totals.non_trainable_params,
        "buffers": totals.buffers,
        "param_bytes": totals.param_bytes,
        "buffer_bytes": totals.buffer_bytes,
    }


# --- summary -------------------------------------------------------------------------------------------------------


#: What a summary can be sorted by; numbers come from the largest, paths from A to Z. `mult-adds` means `macs`.
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
    """One row a module with its output shape and multiply-accumulates, and the totals.

    Where `folded`, the table has one row for each run of siblings that are alike, with the sums over it; the document
    has a row for each module in any case. `sort` is one of SUMMARY_KEYS, or None for the model's own order. `paths` are
    the modules to show, by default all; the totals are those of the whole model. A terminal shows large counts with
    three digits, unless `exact`.
    """
    trace = blueprint.trace
    assert trace is not None
    made = trace.reason is None or bool(trace.layers)  # where no pass was made, nothing is known of any module
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


_TRAINABLE = Column("trainable", "trainable")


def _trainable_column(rows: Sequence[Mapping[str, Any]]) -> Column:
    """Whether modules are trained; on a narrow terminal left out where all are, which the totals say as well."""
    told = any(row["trainable"] in (False, "partial") for row in rows)
    return replace(_TRAINABLE, optional=0 if told else 1)


def _folded_layers(
    blueprint: Blueprint, layers: Mapping[str, dict[str, Any]], depth: int | None
) -> Iterator[dict[str, Any]]:
    """The rows of a summary with one for each run: what its modules have in common, and what they add up to."""
    runs = Runs(blueprint, traced=True)
    for run in runs.below(depth=depth):
        one = layers[run.first]
        macs = [layers[path]["macs"] for path in run.paths]
        yield one | {
            "path": run.path,
            "type": _times(run, one["type"]),
            "params": runs.params_of(run),
            "macs": None if None in macs else sum(macs),
        }


def _times(run: Run, what: str | None) -> str | None:
    """`12 x EncoderBlock`; of modules that nothing is known of, how many they are."""
    return what if len(run.paths) == 1 else f"{len(run.paths)} x {what or '-'}"


def _sorted_layers(rows: Iterable[dict[str, Any]], key: str | None) -> list[dict[str, Any]]:
    if key is None:
        return list(rows)
    if key == "path":
        return sorted(rows, key=lambda row: row["path"])
    key = "macs" if key == "mult-adds" else key
    return sorted(rows, key=lambda row: -1 if row[key] is None else row[key], reverse=True)


def _output_text(layer: Mapping[str, Any], *, passed: bool) -> str:
    """What stands for the output shape: `not called` is for a pass that was made and did not come by."""
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


# --- params --------------------------------------------------------------------------------------------------------

SORT_KEYS = ("name", "shape", "dtype", "elements", "bytes", "kind")
STATS = ("min", "max", "mean", "std", "zeros", "nan", "inf")


def params(
    reference: str,
    blueprint: Blueprint,
    tensors: Sequence[TensorInfo],
    *,
    values: Mapping[str, Any] | None = None,
    value_texts: Mapping[str, str] | None = None,
    stats: Mapping[str, Mapping[str, Any]] | None = None,
) -> View:
    """One row a tensor, and the totals of the tensors shown; what `stats` does not tell of a tensor is null."""
    rows = []
    for tensor in tensors:
        row: dict[str, Any] = {
            "name": tensor.name,
            "shape": None if tensor.shape is None else list(tensor.shape),
            "dtype": tensor.dtype,
            "elements": tensor.elements,
            "bytes": tensor.nbytes,
            "kind": tensor.kind,
            "trainable": tensor.requires_grad if tensor.kind == "parameter" else None,
            "tied_to": tensor.tied_to,
        }
        if not tensor.persistent:
            row["persistent"] = False
        if tensor.layout != "strided":
            row["layout"] = tensor.layout
        if values is not None:
            row["values"] = values.get(tensor.name)
        if stats is not None:
            row["stats"] = {key: stats.get(tensor.name, {}).get(key) for key in STATS}
        rows.append(row)
    totals = totals_of(tensors)
    document = {
        "schema": SCHEMA,
        "model": model_of(reference, blueprint),
        "tensors": rows,
        "totals": totals_document(totals),
    }
    columns = [
        path_column("name", "name"),
        Column("shape", "shape", shape, optional=3 if stats is not None else 0),
        Column("dtype", "dtype", optional=4 if stats is not None else 0),
        Column("elements", "elements", count, right=True, optional=5 if stats is not None else 0),
        Column("bytes", "bytes", count, right=True, optional=9),
        Column("kind", "kind", optional=8),
        Column("trainable", "trainable", optional=7),
    ]
    if any("layout" in row for row in rows):
        columns.append(Column("layout", "layout"))
        rows = [{"layout": "strided"} | row for row in rows]
    if any(row["tied_to"] for row in rows):
        columns.append(Column("tied_to", "tied to", optional=6 if stats is not None else 0))
    if stats is not None:
        columns += _stat_columns(rows)
        rows = [row | _stat_cells(row) for row in rows]
    if value_texts is not None:
        columns.append(Column("value_text", "values", flexible=True))
        rows = [row | {"value_text": value_texts.get(row["name"], "-")} for row in rows]
    footer = [
        ("Tensors", count(len(rows))),
        *([("Not finite", _not_finite(rows))] if stats is not None else []),
        ("Params", _params_text(tensors, totals)),
        ("Buffers", count(totals.buffers)),
        ("Size", megabytes(totals.param_bytes + totals.buffer_bytes)),
    ]
    return View(document, rows, columns, footer, dimmed=lambda row: row["trainable"] is False)


def _stat_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """A column for each statistic; a narrow terminal has none for NaN and Inf where there are none."""
    return [
        *(Column(key, key, number, right=True) for key in ("min", "max", "mean", "std")),
        Column("zeros", "zeros", percent, right=True, optional=1),
        Column("nan", "NaN", count, right=True, optional=0 if any(row["stats"]["nan"] for row in rows) else 2),
        Column("inf", "Inf", count, right=True, optional=0 if any(row["stats"]["inf"] for row in rows) else 2),
    ]


def _stat_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    zeros = row["stats"]["zeros"]
    return {**row["stats"], "zeros": None if zeros is None else Share(zeros, row["elements"])}


def _not_finite(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many of the tensors have a NaN or an Inf among their elements."""
    return count(sum(bool(row["stats"]["nan"] or row["stats"]["inf"]) for row in rows))


def _params_text(tensors: Sequence[TensorInfo], totals: Totals) -> str:
    """The number of parameters, and of those trained where anything says that."""
    known = totals.trainable_params is not None and totals.params
    return count(totals.params) + (f" ({count(totals.trainable_params)} trainable)" if known else "")


# --- modules -------------------------------------------------------------------------------------------------------


def modules(
    reference: str,
    blueprint: Blueprint,
    paths: Sequence[str],
    *,
    depth: int | None,
    style: str = "table",
    folded: bool = False,
) -> View:
    """One row a module. `style` is `table`, `tree` or `repr`; the last two show what lies below each path as well.

    Where `folded`, a tree has one line for each run of siblings that are alike.
    """
    picked = [blueprint.by_path[path] for path in paths]
    rows = [_module_row(blueprint, module) for module in picked if depth is None or module.depth <= depth]
    totals = totals_document(blueprint.totals)
    document = {"schema": SCHEMA, "model": model_of(reference, blueprint), "modules": rows, "totals": totals}
    body, tree, hidden = None, None, 0
    if style == "tree":
        runs = Runs(blueprint, traced=False) if folded else None
        trees = [_tree(blueprint, path, depth, runs) for path in _outermost(paths)]
        tree = [line for lines, _ in trees for line in lines]
        hidden = sum(count for _, count in trees)
    elif style == "repr":
        body = "\n".join(repr_text(blueprint, path) for path in _outermost(paths))
    columns = (
        path_column("path", "path"),
        Column("type", "type", flexible=True),
        Column("config", "configuration", flexible=True, spare=1),
        Column("params", "params", count, right=True),
        replace(_TRAINABLE, spare=2),
    )
    nested = len(picked) == len(blueprint.modules)
    footer = [("Modules", count(len(rows)))]
    return View(document, rows, columns, footer, body=body, tree=tree, nested=nested, folded=hidden)


def _module_row(blueprint: Blueprint, module: ModuleInfo) -> dict[str, Any]:
    return {
        "path": shown(module.path),
        "type": module.type,
        "config": " ".join(module.config.split()),
        "params": blueprint.params_of(module.path),
        "trainable": blueprint.trainable_of(module.path),
        "shared_with": module.shared_with,
    }


def _outermost(paths: Sequence[str]) -> list[str]:
    """The paths that do not lie inside another one."""
    found: dict[str, None] = {}
    for path in paths:
        if not lies_in(path, found):
            found[path] = None
    return list(found)


def _tree(blueprint: Blueprint, top: str, depth: int | None, runs: Runs | None) -> tuple[list[Branch], int]:
    """The modules below a path, a line each, indented with guides; and how many have no line but that of their run."""
    lines, hidden = [], 0
    # Runs still to be written: what stands before the label, and before those of the children.
    stack = [(Run(shown(top), shown(top), (top,), blueprint.by_path[top].depth), "", "")]
    while stack:
        run, before, guide = stack.pop()
        lines.append(_branch(blueprint, run, runs, before))
        hidden += len(run.paths) - 1
        if depth is not None and run.depth >= depth:
            continue
        children = _single(blueprint, run) if runs is None else runs.children(run)
        rows = [(child, f"{guide}├── ", f"{guide}│   ") for child in children]
        rows[-1:] = [(child, f"{guide}└── ", f"{guide}    ") for child, _, _ in rows[-1:]]
        stack += reversed(rows)
    return lines, hidden


def _single(blueprint: Blueprint, run: Run) -> list[Run]:
    """The children of a module, each a run of its own."""
    names = [(child.path, child.path.rpartition(".")[2]) for child in blueprint.children.get(run.first, ())]
    return [Run(path, name, (path,), run.depth + 1) for path, name in names]


def _branch(blueprint: Blueprint, run: Run, runs: Runs | None, guide: str) -> Branch:
    """The line of a module or run in a tree."""
    module = blueprint.by_path[run.first]
    size = blueprint.params_of(run.first) if runs is None else runs.params_of(run)
    rest = f"  {size:,}" if size else ""
    if module.shared_with is not None:
        rest += f"  (same as {shown(module.shared_with)})"
    if (kind := _times(run, module.type)) is None:
        return Branch(guide, run.name, rest=rest)
    config = "" if module.type is None else f"({' '.join(module.config.split())})"
    return Branch(guide, f"{run.name}  {kind}", config, rest)


# --- edits, load, save, list, log ----------------------------------------------------------------------------------


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
    if all(row["action"] in ("freeze", "unfreeze") for row in rows):
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


def script(reference: str, blueprint: Blueprint, text: str) -> View:
    """A script, as its text; a line a row."""
    document = {"schema": SCHEMA, "model": model_of(reference, blueprint), "script": text}
    rows = [{"line": line} for line in text.splitlines()]
    return View(document, rows, [Column("line", "line")], body=text.removesuffix("\n"))


def _difference(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,} ({after - before:+,})"


def load(
    reference: str,
    blueprint: Blueprint,
    *,
    matched: int,
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Sequence[Mapping[str, Any]],
    outcome: Sequence[tuple[str, str]],
    most: int | None = None,
) -> View:
    """How a checkpoint's keys fit the architecture; the table has at most so many rows of each kind of problem."""
    document = {
        "schema": SCHEMA,
        "model": model_of(reference, blueprint),
        "matched": matched,
        "missing": list(missing),
        "unexpected": list(unexpected),
        "mismatched": [dict(mismatch) for mismatch in mismatched],
    }
    rows: list[dict[str, Any]] = [
        {"name": item["name"], "problem": "mismatched", "expected": item["expected"], "found": item["found"]}
        for item in mismatched[:most]
    ]
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        rows += [{"name": name, "problem": problem, "expected": None, "found": None} for name in names[:most]]
    columns = (
        path_column("name", "name"),
        Column("problem", "problem", style="red"),
        Column("expected", "expected", shape),
        Column("found", "found", shape),
    )
    footer = [
        ("matched", count(matched)),
        ("missing", _of_which(len(missing), most)),
        ("unexpected", _of_which(len(unexpected), most)),
        ("mismatched", _of_which(len(mismatched), most)),
    ]
    return View(document, rows, columns, [*footer, *outcome], header=bool(rows))


def _of_which(number: int, most: int | None) -> str:
    """`118 (20 above, and 98 more: --json shows all)`; the number alone where all have a row."""
    more = f" ({most} above, and {count(number - most)} more: --json shows all)" if most and number > most else ""
    return f"{count(number)}{more}"


def save(
    reference: str,
    blueprint: Blueprint,
    *,
    output: str | None,
    kind: str,
    tensors: int,
    nbytes: int | None,
    check: Mapping[str, Any],
) -> View:
    """What was saved where, or would be (`output` and `bytes` are null); `bytes` is the size of the file."""
    document = {
        "schema": SCHEMA,
        "model": model_of(reference, blueprint),
        "output": output,
        "format": kind,
        "tensors": tensors,
        "params": blueprint.totals.params,
        "bytes": nbytes,
        "check": dict(check),
    }
    row = {key: document[key] for key in ("output", "format", "tensors", "params", "bytes")}
    columns = (
        Column("output", "output", style="cyan", flexible=True, vital=True, cut="middle"),
        Column("format", "format"),
        Column("tensors", "tensors", lambda value: counted(value, "tensor"), right=True),
        Column("params", "params", lambda value: counted(value, "param"), right=True),
        Column("bytes", "bytes", megabytes, right=True),
    )
    return View(document, [row], columns, header=False)


# --- diff ----------------------------------------------------------------------------------------------------------


def diff(a: str, b: str, found: Comparison, *, values: bool, folded: bool = False) -> View:
    """What differs between two models: a row a change, modules before tensors.

    Where `folded`, the table has one row for the same change of numbered siblings; the document has a row for each.
    """
    modules = [{**asdict(change), "path": shown(change.path)} for change in found.modules]
    tensors = [asdict(change) for change in found.tensors]
    document = {"schema": SCHEMA, "a": a, "b": b, "same": found.same, "modules": modules, "tensors": tensors}
    rows = [{"kind": "module", "name": row["path"], **row, **_what_differs(row)} for row in modules]
    rows += [{"kind": "tensor", **row} for row in tensors]
    every = len(rows)
    if folded:
        from modelcli.render import folding

        rows = [{**fold.rows[0], "name": fold.path} for fold in folding.folded(rows, "name", _looks_of_difference)]
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
        return View(document, rows, columns, body=f"{a} and {b} are {what}: {equal} {_are(found.equal)} equal")
    footer = [("Modules", _differing(found.modules, "path"))] if modules else []
    differing = _differing(found.tensors, "name")
    footer.append(("Tensors", f"{differing}, {found.equal:,} {_are(found.equal)} equal"))
    largest = max((row for row in found.tensors if row.max_abs_diff is not None), key=_size_of, default=None)
    if largest is not None:
        footer.append(("Largest difference", f"{number(largest.max_abs_diff)} in {largest.name}"))
    return View(document, rows, columns, footer, folded=every - len(rows))


def _looks_of_difference(row: Mapping[str, Any]) -> tuple[object, ...]:
    """What a row shows of a difference besides its name."""
    return row["kind"], row["change"], _side(row["before"]), _side(row["after"]), number(row.get("max_abs_diff"))


def _what_differs(row: Mapping[str, Any]) -> dict[str, str]:
    """Of two configurations the arguments that differ: the others would fill the columns."""
    if row["change"] != "config":
        return {}
    sides = [_arguments(row[side]) for side in ("before", "after")]
    kept = [
        [argument for argument in side if argument not in other] for side, other in zip(sides, sides[::-1], strict=True)
    ]
    return {side: ", ".join(parts) for side, parts in zip(("before", "after"), kept, strict=True)} if all(kept) else {}


def _arguments(printed: str) -> list[str]:
    """What stands between the parentheses of a printed module, cut at the commas that lie in no others."""
    inside = printed.partition("(")[2].removesuffix(")")
    return re.split(r",\s(?![^(\[]*[)\]])", inside)


def _size_of(change: TensorChange) -> float:
    """What its difference ranks as: NaN is more than any other."""
    size = change.max_abs_diff
    return math.inf if size is None or math.isnan(size) else size


def _side(value: Any) -> str:
    """What stands before or after a change: a shape, a word, a flag, or the shape and dtype of a tensor."""
    if isinstance(value, Mapping):
        return f"{shape(value['shape'])} {value['dtype']}"
    return shape(value) if isinstance(value, list) else text(value)


def _differing(changes: Sequence[ModuleChange] | Sequence[TensorChange], key: str) -> str:
    """`12 differ, 2 added, 1 removed`: how many have changed, whatever number of changes each has."""
    kinds: dict[str, str] = {}
    for change in changes:
        name: str = getattr(change, key)
        kinds[name] = change.change if change.change in ("added", "removed") else "differ"
    counts = Counter(kinds.values())
    parts = [f"{counts[kind]:,} {kind}" for kind in ("differ", "added", "removed") if counts[kind]]
    return (
        ", ".join(part.replace("1 differ", "1 differs") if part == "1 differ" else part for part in parts) or "0 differ"
    )


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


# --- check ---------------------------------------------------------------------------------------------------------


def check(reference: str, blueprint: Blueprint, checks: Sequence[Mapping[str, Any]]) -> View:
    """One row an assertion: whether it holds, what was found, and what was wanted.

    A row with `on_record` says why a file's record alone answers it.
    """
    passed = sum(row["passed"] for row in checks)
    document = {
        "schema": SCHEMA,
        "model": model_of(reference, blueprint),
        "passed": passed == len(checks),
        "checks": [dict(row) for row in checks],
    }
    rows = sorted(map(_with_basis, checks), key=lambda row: bool(row["passed"]))  # what fails is read first
    footer = [("Checks", f"{passed} of {len(checks)} passed")]
    return View(document, rows, _CHECK_COLUMNS, footer, alarming=lambda row: not row["passed"])


_CHECK_COLUMNS = (
    Column("check", "check", style="cyan"),
    Column("passed", "result", lambda value: "passed" if value else "FAILED"),
    Column("found", "found", finding, flexible=True),
    Column("wanted", "wanted", finding, flexible=True),
)


def _with_basis(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a table has it: what a file's record alone says is told as that."""
    if "on_record" not in row:
        return dict(row)
    why = row["on_record"]
    return dict(row) | {"found": f"{finding(row['found'])} (the record says so, and nothing else: {why})"}


def checks(outcomes: Sequence[CheckedModel]) -> View:
    """The assertions about several models: one row an assertion, with the model that it is about."""
    rows = [{"model": found.model} | _with_basis(row) for found in outcomes for row in found.rows]
    passed = sum(row["passed"] for row in rows)
    document = {
        "schema": SCHEMA,
        "passed": passed == len(rows),
        "models": [
            {
                "model": {"reference": found.model, "class": found.type},
                "passed": all(row["passed"] for row in found.rows),
                "checks": [dict(row) for row in found.checks],
                **({} if found.error is None else {"error": error_document(found.error)}),
            }
            for found in outcomes
        ],
    }
    columns = (path_column("model", "model"), *_CHECK_COLUMNS)
    rows.sort(key=lambda row: bool(row["passed"]))  # what fails is read first
    footer = [("Checks", f"{passed} of {len(rows)} passed")]
    return View(document, rows, columns, footer, alarming=lambda row: not row["passed"])


def error_document(error: ModelcliError) -> dict[str, Any]:
    """An error as the JSON documents have it."""
    return {"kind": error.kind, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}


# --- identify ------------------------------------------------------------------------------------------------------

#: Tensors that a row names of those that do not fit.
_MOST_NAMED = 4


def identify(reference: str, matches: Sequence[Match]) -> View:
    """The models that a checkpoint fits or comes near, a row each, and what does not fit."""
    entries = [
        {
            "model": match.model,
            "exact": match.exact,
            "matched": match.matched,
            "missing": list(match.missing),
            "unexpected": list(match.unexpected),
            "mismatched": [
                asdict(item) | {"expected": [*item.expected], "found": [*item.found]} for item in match.mismatched
            ],
        }
        for match in matches
    ]
    document = {"schema": SCHEMA, "matches": entries}
    columns = (
        Column("model", "model", style="cyan"),
        Column("exact", "fits", lambda value: "exactly" if value else "nearly"),
        Column("matched", "matched", count, right=True),
        Column("differing", "what does not fit", flexible=True),
    )
    if not matches:
        return View(document, [], columns, body=f"{reference} comes near no torchvision builder")
    return View(
        document, [row | {"differing": _unfit(match)} for row, match in zip(entries, matches, strict=True)], columns
    )


def _unfit(match: Match) -> str:
    """The first tensors that do not fit, those of another shape first."""
    parts = [f"{item.name} {shape([*item.found])} not {shape([*item.expected])}" for item in match.mismatched]
    parts += [f"{name} missing" for name in match.missing] + [f"{name} unexpected" for name in match.unexpected]
    return listed(parts, _MOST_NAMED)


def models(entries: Sequence[Mapping[str, Any]]) -> View:
    """The torchvision builders."""
    document = {"schema": SCHEMA, "models": [dict(entry) for entry in entries]}
    columns = (
        path_column("name", "name"),
        Column("params", "params", count, right=True),
        Column("macs", "mult-adds", count, right=True, optional=2),
        Column("group", "group", optional=3),
        Column("weights", "weights", lambda value: " ".join(value), optional=1),
    )
    return View(document, list(entries), columns, [("Builders", count(len(entries)))])


def cache(folder: Path, entries: int, nbytes: int) -> View:
    """Where blueprints are kept, and what they take."""
    row = {"path": str(folder), "entries": entries, "bytes": nbytes}
    columns = (
        Column("path", "path", style="cyan", flexible=True, vital=True, cut="middle"),
        Column("entries", "entries", lambda value: counted(value, "entry", "entries"), right=True),
        Column("bytes", "bytes", megabytes, right=True),
    )
    return View({"schema": SCHEMA, **row}, [row], columns, header=False)


def log(reference: str, kind: str | None, recipe: Path, lines: Sequence[str], details: Mapping[str, Any]) -> View:
    """The working recipe, an edit a row."""
    document = {
        "schema": SCHEMA,
        "recipe": str(recipe),
        "model": {"reference": reference, "class": kind},
        **details,
        "edits": list(lines),
    }
    rows = [{"number": number, "edit": line} for number, line in enumerate(lines, 1)]
    columns = (Column("number", "#", right=True), Column("edit", "edit", flexible=True, cut="middle"))
    footer = [("recipe", str(recipe)), ("model", reference)]
    told = dict(details)
    if sizes := told.get("input_size"):
        told["input_size"] = " and ".join(",".join(map(str, size)) for size in sizes)  # as the option is written
    footer += [(key, text(value)) for key, value in told.items() if value not in (None, [], ())]
    return View(document, rows, columns, footer, header=bool(rows))
