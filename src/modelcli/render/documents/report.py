"""The view of `report`: one line that says what was written. Its JSON document has the data of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelcli.render.documents.common import SCHEMA, model_of
from modelcli.render.documents.diff import diff
from modelcli.render.documents.params import params
from modelcli.render.documents.summary import summary
from modelcli.render.views import Column, View, megabytes, path_column
from modelcli.render.writers import safe

if TYPE_CHECKING:
    from modelcli.commands.report import Against, Origin, Report


def report(found: Report, output: str, nbytes: int, *, whole: bool) -> View:
    """Return the view of a written page.

    Args:
        found: what the page shows.
        output: the path of the page.
        nbytes: its size in bytes.
        whole: whether the JSON document will be printed; else it is left out, because it may be long.
    """
    reference, blueprint = found.origin.reference, found.blueprint
    row = {"output": output, "bytes": nbytes}

    document = {"schema": SCHEMA, "model": model_of(reference, blueprint), **row, **(_document(found) if whole else {})}
    body = f"written: {safe(output)} ({megabytes(nbytes)})"
    columns = (path_column("output", "output"), Column("bytes", "bytes", right=True))
    return View(document, [row], columns, body=body)


def _document(found: Report) -> dict[str, Any]:
    """Return the data of a page: that of `summary`, `params` and `diff`, and where the model comes from."""
    reference, blueprint = found.origin.reference, found.blueprint
    modules = summary(reference, blueprint).document
    statistics = None if found.values is None else found.values.statistics
    tensors = params(reference, blueprint, blueprint.tensors, stats=statistics).document["tensors"]
    if found.values is not None:
        for tensor in tensors:
            histogram = found.values.histograms.get(tensor["name"])
            tensor["histogram"] = (
                None
                if histogram is None
                else {"low": histogram.low, "high": histogram.high, "counts": list(histogram.counts)}
            )
    return {
        "modules": modules["layers"],
        "tensors": tensors,
        "totals": modules["totals"],
        "reason": modules["reason"],
        "origin": _origin(found.origin),
        "against": None if found.against is None else _against(reference, found.against),
    }


def _origin(origin: Origin) -> dict[str, Any]:
    return {
        "reference": origin.reference,
        "path": origin.path,
        "bytes": origin.nbytes,
        "architecture": origin.architecture,
        "weights": origin.weights,
        "seed": origin.seed,
        "edits": list(origin.edits),
        "recorded_in": origin.recorded_in,
    }


def _against(reference: str, against: Against) -> Mapping[str, Any]:
    """Return the document of `diff`, with the relative L2 difference of each tensor whose values differ."""
    document = dict(diff(against.other, reference, against.comparison, values=True).document)
    del document["schema"]
    for tensor in document["tensors"]:
        distance = against.distances.get(tensor["name"]) if tensor["change"] == "values" else None
        tensor["relative_l2"] = None if distance is None else distance.relative
    return document
