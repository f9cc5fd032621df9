"""The views of `memory`: what a step takes by kind, or which modules keep most; the peak, the margin and the total."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelcli.model.memory_log import KINDS
from modelcli.model.paths import shown
from modelcli.render.documents.common import SCHEMA, model_of
from modelcli.render.views import Column, View, megabytes, path_column, shape

if TYPE_CHECKING:
    from modelcli.commands.memory import MemoryResult

#: What a table calls the kinds of memory.
_NAMES = {
    "params": "parameters",
    "buffers": "buffers",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations kept",
    "temporary": "temporary",
}

#: What a table calls the phases of a step.
_PHASES = {"forward": "forward pass", "backward": "backward pass", "update": "optimizer step", "setup": "setup"}


def memory(result: MemoryResult, *, top: int | None = None) -> View:
    """Return the view of the memory of a step.

    Args:
        result: the memory.
        top: how many modules the table shows, those that keep most first; None for a table of the kinds of memory.
    """
    document = _document(result)
    footer = _footer(result)
    if top is None:
        rows: list[dict[str, Any]] = [
            {"kind": _NAMES[kind], "most": document["parts"][kind], "at_peak": document["peak_parts"][kind]}
            for kind in KINDS
        ]
        columns: tuple[Column, ...] = (
            Column("kind", "memory"),
            Column("most", "size", megabytes, right=True),
            Column("at_peak", "at the peak", megabytes, right=True),
        )
        return View(document, rows, columns, footer)
    ranked = sorted(document["modules"], key=lambda row: (-row["activation_bytes"], -row["param_bytes"]))
    kinds = [(name.capitalize(), megabytes(document["parts"][kind])) for kind, name in _NAMES.items()]
    columns = (
        path_column("path", "path"),
        Column("type", "type", flexible=True, spare=1),
        Column("param_bytes", "parameters", megabytes, right=True),
        Column("activation_bytes", "activations kept", megabytes, right=True),
        Column("peak_bytes", "peak while it runs", megabytes, right=True, optional=1),
    )
    return View(document, ranked[:top], columns, [*kinds, *footer])


def _document(result: MemoryResult) -> dict[str, Any]:
    estimate, request = result.estimate, result.request
    types = {module.path: module.type for module in result.blueprint.modules}
    peak, margin = estimate.peak, estimate.margin
    return {
        "schema": SCHEMA,
        "model": model_of(result.model, result.blueprint),
        "input": [list(size) for size in estimate.inputs],
        "batch": estimate.batch,
        "train": None if request.train == "none" else request.train,
        "loss": estimate.loss,
        "amp": request.amp,
        "dtype": request.dtype,
        "checkpointed": list(result.checkpointed),
        "device": request.device,
        "parts": dict(estimate.whole),
        "peak_bytes": peak.allocated,
        "peak_parts": dict(peak.parts),
        "peak_at": None if peak.path is None else shown(peak.path),
        "peak_in": peak.phase,
        "cublas_bytes": estimate.cublas,
        "margin_bytes": margin.total,
        "margin": {
            "workspaces": margin.workspaces,
            "fragmentation": margin.fragmentation,
            "context": margin.context,
        },
        "total_bytes": estimate.total,
        "kv_cache_bytes": estimate.cache_bytes,
        "largest_batch": result.largest_batch,
        "modules": [
            {
                "path": shown(module.path),
                "type": types.get(module.path),
                "param_bytes": result.param_bytes.get(module.path, 0),
                "activation_bytes": module.kept,
                "peak_bytes": module.peak,
            }
            for module in estimate.modules
        ],
    }


def _footer(result: MemoryResult) -> list[tuple[str, str]]:
    estimate, request = result.estimate, result.request
    peak, margin = estimate.peak, estimate.margin
    where = "" if peak.path is None else f"{shown(peak.path)}, "
    lines = [
        ("Input", " ".join(map(shape, map(list, estimate.inputs)))),
        ("Step", _step(result)),
        ("Peak reached in", f"{where}{_PHASES[peak.phase]}"),
        ("Peak", megabytes(peak.allocated)),
    ]
    if estimate.cublas:
        lines.append(("  workspaces of cuBLAS", megabytes(estimate.cublas)))
    if request.device == "cuda":
        lines.append(("Margin", megabytes(margin.total)))
        if margin.workspaces:
            lines.append(("  cuDNN workspaces", f"up to {megabytes(margin.workspaces)}"))
        lines += [
            ("  fragmentation", megabytes(margin.fragmentation)),
            ("  CUDA context", f"about {megabytes(margin.context)}"),
            ("Total", megabytes(estimate.total)),
        ]
    if estimate.cache_bytes is not None:
        lines.append(("Keys and values", megabytes(estimate.cache_bytes)))
    if result.largest_batch is not None and request.fits is not None:
        batch = str(result.largest_batch) if result.largest_batch else "none"
        lines.append((f"Largest batch in {megabytes(request.fits)}", batch))
    return lines


def _step(result: MemoryResult) -> str:
    """Return what the step is: `training with adamw, autocast to bfloat16, cross entropy`."""
    request, estimate = result.request, result.estimate
    words = ["inference" if estimate.loss is None else f"training with {request.train}"]
    if request.dtype is not None:
        words.append(f"in {request.dtype}")
    if request.amp is not None:
        words.append(f"autocast to {request.amp}")
    if result.checkpointed:
        words.append("activation checkpointing")
    if estimate.loss is not None:
        words.append(f"the loss is the {estimate.loss}")
    return ", ".join(words)
