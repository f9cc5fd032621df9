"""The page of a model: one HTML file that contains everything it needs, and loads nothing.

Names from a file are text in it. Jinja2 escapes them, the script puts them into the page as text nodes, and the policy
in the page (Content-Security-Policy) allows one style and one script, each by its hash. No attribute can then carry
style or script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from modelcli._version import __version__
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import shown
from modelcli.model.totals import Totals
from modelcli.render.page import data, heatmap
from modelcli.render.page.heatmap import Heatmap
from modelcli.render.views import compact, count, shape
from modelcli.render.writers import safe
from modelcli.wording import counted, listed

if TYPE_CHECKING:
    from modelcli.commands.report import Against, Origin, Report
    from modelcli.values.differences import Distance
    from modelcli.values.histograms import Histogram
    from modelcli.values.statistics import Statistics

_HERE = Path(__file__).parent
#: How many rows the page has without its script, and how many lines a list.
MOST_TOP, MOST_LINES = 60, 500
#: The statistics of at most this many tensors are on a page.
MOST_VALUES = 20_000
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Fact(NamedTuple):
    """A name, what is said of it, and more in small letters."""

    name: str
    text: str
    more: str = ""


class Legend(NamedTuple):
    """An entry of the legend: how cells look, the letters in the sample, and what they mean."""

    looks: str
    code: str
    name: str
    more: str = ""


def html(found: Report) -> str:
    """Return the page as HTML. The same report gives the same text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: safe(value) if type(value) is str else value,  # a Markup is no plain str
    )
    blueprint, trace = found.blueprint, found.blueprint.trace
    tree = data.Tree(blueprint)
    document = data.document(blueprint, tree)
    style, script = _text("page.css"), _text("page.js")
    families = [family_of(dtype) for dtype in document["dtypes"]]
    macs = None if trace is None else trace.macs
    content: dict[str, Any] = {
        "tree": document,
        "families": [family for family, _ in families],
        "totals": {"params": blueprint.totals.params, "macs": macs},
    }
    notes = [*found.warnings, *found.notes]
    modules, tensors = tree.numbers() if found.values or found.against else ({}, {})
    if found.values is not None:
        content["values"], left_out = _values(found, tensors)
        notes += left_out
    if found.against is not None:
        content["changes"] = _changes(found.against, modules, tensors)
    values = {
        "policy": _policy(style, script),
        "version": __version__,
        "title": found.origin.reference,
        "kind": _kind(found),
        "totals": [*_totals(blueprint, blueprint.totals), *_not_finite(found)],
        "traced": trace is not None and bool(trace.layers),
        "has_macs": bool(macs),
        "top": _top(blueprint, tree),
        "legend": _legend(blueprint),
        "against": None if found.against is None else _against(found, found.against),
        "origin": _origin(found.origin),
        "edits": found.origin.edits[:MOST_LINES],
        "edits_left_out": _more(len(found.origin.edits), "edit"),
        "notes": notes,
        "css": _as_it_is(style),
        "script": _as_it_is(script),
        "data": _as_it_is(_in_html(content)),
    }
    return environment.get_template("page.html").render(values) + "\n"


def _as_it_is(text: str) -> Any:
    """Return a text that Jinja2 does not escape: only our own files, and JSON without `<`, `>` and `&`."""
    from markupsafe import Markup

    return Markup(text)


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Return the page's policy: nothing but this style and this script, and no text may become markup."""
    hashes = (
        base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") for text in (style, script)
    )
    of_style, of_script = hashes
    return (
        f"default-src 'none'; style-src 'sha256-{of_style}'; script-src 'sha256-{of_script}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _in_html(document: object) -> str:
    """Return JSON that can stand in a script element: it has no character that HTML gives a meaning."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# --- the parts of the page -------------------------------------------------------------------------------------------


def family_of(dtype: str) -> tuple[str, str]:
    """Return how cells of a dtype look, and the letters for it: `("bf16", "BF16")`."""
    known = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
    if dtype in known:
        return known[dtype], known[dtype].upper()
    if dtype.startswith("float8"):
        return "f8", "F8"
    if dtype == "bool" or dtype.removeprefix("u").startswith("int"):
        return "int", "INT"
    return "other", "OTH"


def _kind(found: Report) -> str:
    root = found.blueprint.root
    path = found.origin.path
    parts = [root.type or "a state dict of unknown architecture"]
    if path is not None and path != found.origin.reference:
        parts.append(path)
    parts.append(
        f"{counted(len(found.blueprint.modules), 'module')}, {counted(len(found.blueprint.tensors), 'tensor')}"
    )
    return " · ".join(parts)


def _totals(blueprint: Blueprint, totals: Totals) -> list[Fact]:
    trace = blueprint.trace
    facts = [Fact("Parameters", compact(totals.params), _exact(totals.params))]
    if totals.trainable_params is not None:
        facts.append(
            Fact("Trainable", compact(totals.trainable_params), _share(totals.trainable_params, totals.params))
        )
        frozen = totals.params - totals.trainable_params
        if frozen:
            facts.append(Fact("Frozen", compact(frozen), _share(frozen, totals.params)))
    if totals.buffers:
        facts.append(Fact("Buffers", compact(totals.buffers), _exact(totals.buffers)))
    facts.append(Fact("Size", size(totals.param_bytes + totals.buffer_bytes), "parameters and buffers"))
    if trace is not None and trace.macs is not None:
        lower = "at least " if trace.uncounted else ""
        facts.append(Fact("Mult-adds", lower + compact(trace.macs), _exact(trace.macs)))
    if trace is not None and trace.inputs is not None:
        facts.append(Fact("Input", " ".join(shape(list(size)) for size in trace.inputs)))
    if trace is not None and trace.reason is not None:
        facts.append(Fact("Forward pass", "not complete" if trace.layers else "none", trace.reason))
    return facts


def size(nbytes: int) -> str:
    """Return a number of bytes with three digits and a decimal unit: `244 MB`, `670 GB`."""
    rounded = float(f"{nbytes:.3g}")
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if rounded >= 10**power:
            return f"{rounded / 10**power:.4g} {unit}"
    return f"{nbytes} B"


def _exact(value: int) -> str:
    """Return all digits of a number that `compact` shortens."""
    return count(value) if value >= 10_000 else ""


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else ""


def _top(blueprint: Blueprint, tree: data.Tree) -> list[dict[str, str]]:
    """Return the rows of the first two levels for a reader without the script."""
    layers = {} if blueprint.trace is None else blueprint.trace.layers
    rows: list[dict[str, str]] = []
    for path in tree.paths:
        if path.count(".") > 1:
            continue
        if len(rows) == MOST_TOP:
            break
        ran = layers.get(path)
        rows.append(
            {
                "path": shown(path),
                "type": blueprint.by_path[path].type or "-",
                "shape": shape(None if ran is None else ran.output_shape),
                "params": count(blueprint.params_of(path)),
                "macs": count(None if ran is None else ran.macs),
            }
        )
    return rows


def _legend(blueprint: Blueprint) -> list[Legend]:
    elements: dict[str, int] = {}
    for tensor in blueprint.tensors:
        if tensor.kind == "parameter" and tensor.tied_to is None:
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
    entries = [
        Legend(*family_of(dtype), dtype, f"({compact(elements[dtype])})")
        for dtype in sorted(elements, key=lambda each: -elements[each])
    ]
    if len(elements) > 1:
        entries.append(Legend("mixed", "MIX", "several dtypes"))
    if any(tensor.requires_grad is False and tensor.kind == "parameter" for tensor in blueprint.tensors):
        entries.append(Legend("frozen", "FRZ", "frozen"))
    if blueprint.trace is not None and blueprint.trace.macs:
        entries.append(Legend("none", "-", "no parameters"))
    return entries


def _origin(origin: Origin) -> list[Fact]:
    facts = [Fact("Reference", origin.reference)]
    if origin.path is not None:
        facts.append(Fact("File", origin.path))
    if origin.nbytes is not None:
        facts.append(Fact("Size of the file", f"{size(origin.nbytes)} ({count(origin.nbytes)} bytes)"))
    if origin.architecture is not None:
        facts.append(Fact("Architecture", origin.architecture))
    if origin.weights is not None:
        facts.append(Fact("Weights", origin.weights))
    if origin.seed is not None:
        facts.append(Fact("Seed", str(origin.seed)))
    facts.append(Fact("Edits", str(len(origin.edits)) if origin.edits else "none are known"))
    if origin.recorded_in is not None:
        facts.append(Fact("Recorded in", origin.recorded_in))
    return facts


def _more(number: int, noun: str) -> str:
    return f"{counted(number - MOST_LINES, noun)} more" if number > MOST_LINES else ""


# --- values ----------------------------------------------------------------------------------------------------------


def _values(found: Report, numbers: Mapping[str, int]) -> tuple[list[list[Any]], list[str]]:
    """Return the statistics and histograms by the number of the tensor, and a note if there are too many."""
    assert found.values is not None
    statistics = found.values.statistics
    names = [tensor.name for tensor in found.blueprint.tensors if tensor.name in statistics]
    notes = []
    if len(names) > MOST_VALUES:
        sizes = found.blueprint.by_name

        def rank(name: str) -> tuple[bool, int]:
            return not (statistics[name]["nan"] or statistics[name]["inf"]), -sizes[name].elements

        notes.append(
            f"the page has the statistics of {MOST_VALUES:,} of {len(names):,} tensors: those with NaN or Inf, and the "
            "largest; --json has all"
        )
        names = sorted(names, key=rank)[:MOST_VALUES]
    histograms = found.values.histograms
    rows = [[numbers[name], *_value_row(statistics[name], histograms.get(name))] for name in names]
    return sorted(rows), notes


def _not_finite(found: Report) -> list[Fact]:
    """Return how many tensors have a NaN or an Inf, if the values were read."""
    if found.values is None:
        return []
    names = [name for name, each in found.values.statistics.items() if each["nan"] or each["inf"]]
    return [Fact("NaN or Inf", counted(len(names), "tensor") if names else "none", listed(names, 3) if names else "")]


def _value_row(found: Statistics, histogram: Histogram | None) -> list[Any]:
    numbers = [_short(found[key]) for key in ("min", "max", "mean", "std", "zeros", "nan", "inf")]
    if histogram is None:
        return numbers
    most = max(histogram.counts)
    heights = "".join(_DIGITS[math.ceil(60 * each / most)] for each in histogram.counts)
    return [*numbers, heights, _short(histogram.low), _short(histogram.high)]


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --- differences -----------------------------------------------------------------------------------------------------


def _changes(against: Against, modules: Mapping[str, int], tensors: Mapping[str, int]) -> list[list[Any]]:
    """Return [number, letter, relative L2 difference] of each module and tensor that was added or changed.

    A module with a change below it has the letter B.
    """
    letters: dict[int, tuple[str, float | None]] = {}
    names: list[str] = []
    for module in against.comparison.modules:
        if module.path in modules:
            letters[modules[module.path]] = ("A" if module.change == "added" else "C", None)
            names.append(module.path)
    for tensor in against.comparison.tensors:
        if tensor.name in tensors and tensor.change != "not compared":
            distance = against.distances.get(tensor.name)
            relative = None if distance is None else distance.relative
            letters[tensors[tensor.name]] = ("A" if tensor.change == "added" else "C", _finite(relative))
            names.append(tensor.name)
    for name in names:
        while name:
            name = name.rpartition(".")[0]
            if name in modules:
                if modules[name] in letters:
                    if letters[modules[name]][0] == "B":
                        break
                    continue
                letters[modules[name]] = ("B", None)
    return [[number, *letters[number]] for number in sorted(letters)]


def _finite(value: float | None) -> Any:
    if value is None or math.isfinite(value):
        return _short(value)
    return "NaN" if math.isnan(value) else "Infinity"


def _against(found: Report, against: Against) -> dict[str, Any]:
    """Return the section on what differs."""
    from modelcli.render.documents import diff as documents

    comparison = against.comparison
    view = documents.diff(against.other, found.origin.reference, comparison, values=True, folded=True)
    section: dict[str, Any] = {"other": against.other, "heat": None, "changes": [], "columns": [], "left_out": ""}
    if comparison.same:
        section["summary"] = view.body
        return section
    section["summary"] = "; ".join(f"{label}: {text}" for label, text in view.footer)
    section["columns"] = [column.title for column in view.columns]
    section["changes"] = [
        [column.format(row.get(column.key)) for column in view.columns] for row in view.rows[:MOST_LINES]
    ]
    section["left_out"] = _more(len(view.rows), "row")
    if against.distances:
        section["heat"] = _heat(heatmap.heatmap(_compared(found.blueprint, against)))
    return section


#: The changes of a tensor that say nothing about its values.
_BESIDES_VALUES = frozenset(("dtype", "trainable"))


def _compared(blueprint: Blueprint, against: Against) -> dict[str, Distance | None]:
    """Return the distance of each tensor whose values were compared; None for equal values.

    Integers that are equal are left out: counters of batches, and the parts of quantized tensors.
    """
    kinds = {change.name for change in against.comparison.tensors if change.change not in _BESIDES_VALUES}
    found: dict[str, Distance | None] = {}
    for tensor in blueprint.tensors:
        if tensor.name in against.distances:
            found[tensor.name] = against.distances[tensor.name]
        elif tensor.persistent and tensor.is_differentiable and tensor.name not in kinds:
            found[tensor.name] = None
    return found


def _heat(found: Heatmap) -> dict[str, Any]:
    rows = []
    for row in found.rows:
        cells = []
        for column in found.columns:
            relative = found.cells.get((row, column))
            if relative is None:
                cells.append({"looks": "", "text": ""})
            else:
                cells.append({"looks": heatmap.level_of(relative), "text": f"{relative:.2g}" if relative else "0"})
        rows.append({"name": row or ".", "cells": cells})
    left = [counted(number, noun) for number, noun in zip(found.left_out, ("layer", "kind"), strict=True) if number]
    left_out = f"{listed(left, 2)} with smaller differences are left out" if left else ""
    return {"columns": list(found.columns), "rows": rows, "left_out": left_out}
