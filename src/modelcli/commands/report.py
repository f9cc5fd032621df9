"""Collect what the page of a model shows, and write the page: the command `report`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli import resolve
from modelcli.checkpoints import TensorEntry
from modelcli.checkpoints.byte_comparison import nbytes_of
from modelcli.commands import diff, tensor_values
from modelcli.commands.look import Look, LookRequest, look, stdout_is_for_data
from modelcli.commands.target import Target
from modelcli.errors import ModelcliError, RequestError, SystemFailureError
from modelcli.files import atomic
from modelcli.language.quoting import quoted
from modelcli.language.references import CheckpointFile, NamedModel, PythonObject, Source
from modelcli.model.blueprint import Blueprint

if TYPE_CHECKING:
    from modelcli.commands.diff_structure import Comparison
    from modelcli.values.differences import Distance
    from modelcli.values.histograms import Histogram
    from modelcli.values.statistics import Statistics

#: Called with the bytes done, the bytes in total, and the kind of work.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ReportRequest:
    """The model to report on.

    Attributes:
        target: the model.
        other: the model to compare it with, which is the one before; None for no comparison.
        stats: whether to read the values for statistics and histograms.
        cached: whether the blueprint may come from the cache.
    """

    target: Target
    other: Source | None = None
    stats: bool = False
    cached: bool = True


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, as far as that is known.

    Attributes:
        reference: the reference, as it was given.
        path: the file or folder; None for a model that is built.
        nbytes: the size of the file; None for a folder, and for a model that is built.
        architecture: the reference of the architecture, for a file.
        weights: the name of the values that the model started with.
        seed: the seed of random values; None if no value is random as far as is known.
        edits: the edits since, as lines of text.
        recorded_in: where the last four are from: a file with a record, or a recipe; None if neither says it.
    """

    reference: str
    path: str | None = None
    nbytes: int | None = None
    architecture: str | None = None
    weights: str | None = None
    seed: int | None = None
    edits: tuple[str, ...] = ()
    recorded_in: str | None = None


@dataclass(frozen=True)
class Values:
    """The statistics and histograms of the tensors whose values can be read as numbers, by name."""

    statistics: Mapping[str, Statistics]
    histograms: Mapping[str, Histogram]


@dataclass(frozen=True)
class Against:
    """How a model differs from another one.

    Attributes:
        other: the reference of the other model, which is the one before.
        comparison: what was added, removed and changed since.
        distances: the L2 norms of `other` and of the difference, for each tensor whose values were compared: see
            `values.differences.distances`.
    """

    other: str
    comparison: Comparison
    distances: Mapping[str, Distance]


@dataclass(frozen=True)
class Report:
    """Everything that a page shows.

    Attributes:
        blueprint: the model, with its forward pass.
        origin: where it comes from.
        values: statistics of its values, if they were read.
        against: the comparison with another model, if there is one.
        notes: notes for the user; `--quiet` hides them, but not `warnings`.
    """

    blueprint: Blueprint
    origin: Origin
    values: Values | None = None
    against: Against | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def report(request: ReportRequest, progress: Progress | None = None) -> Report:
    """Return everything that the page of a model shows.

    A file is read without torch, unless its record says that its forward pass needs values. With `stats` or `other`,
    the values are read in pieces.

    Raises:
        ModelcliError: a model cannot be opened, or a file is damaged.
    """
    show = progress or (lambda _done, _total, _doing: None)
    target = request.target
    with_values = request.stats or request.other is not None
    wanted = LookRequest(
        target, traced=True, cached=request.cached and not with_values, of_files=with_values, values=with_values
    )
    found = look(wanted)
    against = None if request.other is None else _against(found, target.source.model, request.other, show)
    return Report(
        found.blueprint,
        _origin(target, found),
        _values(found, show) if request.stats else None,
        against,
        found.notes if against is None else (*found.notes, *_notes_of_comparison(against, target.source.model)),
        found.warnings if against is None else (*found.warnings, *against.comparison.warnings),
    )


def other_side(target: Target, model: str) -> Source:
    """Return the model before. The options of the command apply to it as to the model itself, as in `diff`."""
    source = replace(target.source, model=model, folder=Path(), input_size=None, input_dtype=(), inputs=())
    if source.key is not None and not diff.is_training_checkpoint(source):
        return replace(source, key=None)
    return source


def _origin(target: Target, found: Look) -> Origin:
    """Return where a model comes from."""
    source, contents = target.source, found.contents
    path = None if contents is None else contents.path
    nbytes = None
    if contents is not None and path is not None and not contents.is_remote:
        try:
            nbytes = path.stat().st_size if path.is_file() else None
        except OSError:
            nbytes = None
    record = found.record or (contents.record if contents is not None else None)
    shown = None if path is None else str(path)
    if record is not None:
        edits = (*record.edits, *map(str, target.edits))
        return Origin(source.model, shown, nbytes, record.reference, record.weights, record.seed, edits, shown)
    recipe = None if target.recipe is None else str(target.recipe)
    seed = source.seed if source.seed is not None or path is not None else 0
    lines = tuple(map(str, target.edits))
    return Origin(source.model, shown, nbytes, source.arch, source.weights, seed, lines, recipe)


@stdout_is_for_data
def _values(found: Look, progress: Progress) -> Values:
    """Read all values twice: for the statistics, and then, as their ranges are known, for the histograms."""
    from modelcli.values import histograms

    names = [tensor.name for tensor in found.blueprint.tensors]
    statistics = tensor_values.stats(found, names, lambda done, total: progress(done, total, "reading"))
    entries = {
        name: entry for name, entry in tensor_values.entries_of(found, names).items() if isinstance(entry, TensorEntry)
    }
    counted = histograms.collect(entries, statistics, lambda done, total: progress(done, total, "counting"))
    return Values(statistics, counted)


def _against(found: Look, name: str, source: Source, progress: Progress) -> Against:
    """Compare a model with the one before. The values of tensors with different bytes are read twice."""
    other = diff.open_side(source, values=True)
    comparison = diff.compare(other, found, (source.model, name), progress=progress)
    return Against(source.model, comparison, _distances(other, found, comparison, progress))


def _notes_of_comparison(against: Against, name: str) -> tuple[str, ...]:
    """Return the notes of a comparison without those of the model itself, which are shown already."""
    return tuple(note for note in against.comparison.notes if not note.startswith(f"{name}: "))


@stdout_is_for_data
def _distances(other: Look, found: Look, comparison: Comparison, progress: Progress) -> dict[str, Distance]:
    """Return the norms of the differences of all tensors whose values were compared."""
    from modelcli.values import differences

    changed = {change.name for change in comparison.tensors if change.change == "values"}
    before, after = diff.entries(other), diff.entries(found)
    pairs: dict[str, tuple[TensorEntry, TensorEntry]] = {}
    for name in changed:
        left, right = before.get(name), after.get(name)
        if isinstance(left, TensorEntry) and isinstance(right, TensorEntry) and left.shape == right.shape:
            pairs[name] = left, right
    total = sum(nbytes_of(left) for left, _ in pairs.values())
    done = 0

    def more(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total, "measuring")

    return differences.distances(pairs, more)


# --- the file --------------------------------------------------------------------------------------------------------

#: The suffix of a page.
SUFFIX = ".html"
_MOST_OF_NAME = 100


def default_name(source: Source) -> str:
    """Return the name of the page of a model: `alexnet.html`, `best.html` for `runs/best.pth`, `Net.html`."""
    try:
        reference = resolve.reference_of(source)
    except ModelcliError:
        reference = None
    match reference:
        case CheckpointFile(path):
            path = Path(os.path.realpath(source.folder / path))
            name = path.name if path.is_dir() else path.stem
        case NamedModel(call):
            name = call.name.rpartition("/")[2]
        case PythonObject(name=own):
            name = own
        case _:
            name = ""
    safe = re.sub(r"[^\w.-]+", "_", name).strip("._-")[:_MOST_OF_NAME]
    return f"{safe or 'model'}{SUFFIX}"


def write(page: str, out: Path, *, force: bool) -> int:
    """Write a page in one step, and return its size in bytes.

    Raises:
        RequestError: `out` exists and `force` is not set.
        SystemFailureError: the system failed.
    """
    data = page.encode("utf-8", "backslashreplace")
    with atomic.replacing(out, force=force) as (file, _):
        file.write(data)
    return len(data)


def check_out(out: Path, *, force: bool) -> None:
    """Raise an error if the page cannot be written, before the model is opened.

    Another suffix is an error, so that `--force` cannot put a page in the place of a checkpoint.
    """
    if out.is_dir():
        raise RequestError(f"{out} is a folder", f"name a file in it: -o {quoted(out / f'model{SUFFIX}')}")
    if out.suffix.lower() not in (SUFFIX, ".htm"):
        raise RequestError(f"{out} is no name of a page", f"-o {quoted(out.with_name(out.name + SUFFIX))}")
    atomic.check_target(out, force=force)


def require_display(out: Path) -> None:
    """Raise RequestError where no browser could show a page."""
    if sys.platform in ("win32", "darwin") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))):
        return
    raise RequestError(
        "--open needs a display, and neither $DISPLAY nor $WAYLAND_DISPLAY is set",
        f"remove --open, and open {out} on a machine with a browser",
    )


def show_in_browser(out: Path) -> None:
    """Open a page in the user's browser. Raises SystemFailureError if there is none."""
    import webbrowser

    if not webbrowser.open(out.resolve().as_uri()):
        raise SystemFailureError(f"no browser could be started to open {out}", f"open {out} in a browser yourself")
