"""What a command does, from the words it was given to a value that can be shown.

The one place that decides whether torch is needed: a checkpoint is looked at without it, everything else is not.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from modelcli import blueprints, cache, checkpoints, fingerprints, likeness, references, selectors
from modelcli import record as records
from modelcli.blueprints import Blueprint, Totals, Trace
from modelcli.checkpoints import Contents
from modelcli.checkpoints.contents import foreign_names
from modelcli.edits import Edit
from modelcli.errors import ModelcliError, RequestError
from modelcli.references import CheckpointFile, Installed, PythonObject, Source

if TYPE_CHECKING:
    from modelcli.live.check import Check
    from modelcli.live.opening import Live
    from modelcli.live.scripting import Script
    from modelcli.live.stats import Statistics
    from modelcli.writing import Written


#: How the note begins that names the builders a file fits.
LOOKS_LIKE = "looks like torchvision"

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Target:
    """The model that a command works on: where it comes from, the edits of its recipe, and that recipe, if any.

    `places` are where those edits stand: `modelcli.toml:5`. `notes` are what there is to tell of the choice.
    """

    source: Source
    edits: tuple[Edit, ...] = ()
    recipe: Path | None = None
    places: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def options_given(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given: a number may be 0, and is given all the same."""
    return {key: value for key, value in overrides.items() if value is not None and value != () and value is not False}


def find_target(
    model: str | None,
    overrides: Mapping[str, Any],
    recipe_path: Path | None = None,
) -> Target:
    """The argument or `-m`, else `$MODELCLI_MODEL`, else the working recipe. Overrides win over the recipe's lines."""
    given = options_given(overrides)
    if model:
        return Target(Source(model=model, **given))
    from modelcli import recipe

    path = recipe_path or recipe.default_path()
    if named := os.environ.get("MODELCLI_MODEL"):
        note = f"$MODELCLI_MODEL is {named}, and goes before {path}: unset it to work on the recipe"
        return Target(Source(model=named, **given), notes=(note,) if path.exists() else ())
    read = recipe.read(path)
    return Target(replace(read.source, **given), read.edits, read.path, read.places)


def names_model(word: str) -> bool:
    """Whether a word is the name of a builder, or of a checkpoint that is there."""
    from modelcli.live import zoo

    try:
        reference = references.parse(word)
    except RequestError:
        return False
    return isinstance(reference, CheckpointFile) or word in zoo.builder_names()


@dataclass(frozen=True)
class Batch:
    """Edits to carry out together: on what, and where each of them stands."""

    target: Target
    edits: tuple[Edit, ...] = ()
    places: tuple[str, ...] = ()


def find_batch(
    recipe_path: Path | None,
    lines: Sequence[tuple[str, str]],
    model: str | None,
    overrides: Mapping[str, Any],
    working_recipe: Path | None = None,
) -> Batch:
    """The edits of a recipe and those of `lines` (place, text) after them, and the model that they are for.

    `model` takes the place of the recipe's own model, with all that belongs to that one: weights, architecture, key.
    Without a recipe and without a model the lines are for the working recipe, and without lines its edits are meant.

    Raises RequestError that names every bad line, before anything is opened.
    """
    from modelcli import edits, recipe

    if recipe_path is None and not lines:
        if model is not None and not (working_recipe or recipe.default_path()).exists():
            raise RequestError("no edits are given", "-e EDIT gives one, a path a recipe, and - standard input")
        recipe_path = working_recipe or recipe.default_path()
    elif recipe_path is not None and not recipe_path.exists():
        raise references.missing_file(recipe_path, str(recipe_path))
    problems: list[str] = []
    read: recipe.Recipe | None = None
    made: list[Edit] = []
    try:
        read = None if recipe_path is None else recipe.read(recipe_path, model=model)
    except RequestError as error:
        if not lines:
            raise
        problems.append(str(error))
    try:
        made = edits.parse_all(lines)
    except RequestError as error:
        problems.append(error.message)
    if problems:
        raise RequestError("\n".join(problems))
    if read is None:
        target = find_target(model, overrides, working_recipe)
        return Batch(target, tuple(made), tuple(place for place, _ in lines))
    source = read.source
    if model is not None:
        source = Source(model, seed=source.seed, input_size=source.input_size, input_dtype=source.input_dtype)
    target = Target(replace(source, **options_given(overrides)))
    found = Batch(target, (*read.edits, *made), (*read.places, *(place for place, _ in lines)))
    if not found.edits:
        raise RequestError(f"{read.path} has no edits to apply", "modelcli save OUT writes a model as it is")
    return found


@dataclass(frozen=True)
class Look:
    """A blueprint to show, and what to tell about it. `warnings` are told whoever wants to hear nothing."""

    blueprint: Blueprint
    notes: tuple[str, ...] = ()
    contents: Contents | None = None
    live: Live | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        if self.contents is None or not self.contents.foreign:
            return ()
        names = foreign_names(self.contents.foreign, most=20)
        return (f"{self.contents.path} also holds objects of {names}: none was loaded, the tensors are shown",)

    @property
    def foreign(self) -> tuple[str, ...]:
        """The names in the file that only running code could follow."""
        return () if self.contents is None else self.contents.foreign


def stdout_is_for_data(function: Callable[P, R]) -> Callable[P, R]:
    """What a model's own code prints while it is built or run goes to standard error: data alone goes to the other."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.redirect_stdout(sys.stderr):
            return function(*args, **kwargs)

    return call


@stdout_is_for_data
def look(target: Target, *, traced: bool = False, mode: str = "eval", cached: bool = True) -> Look:
    """The blueprint of a model as it stands, its recipe's edits applied. With `traced`, with a forward pass in it.

    Blueprints of installed models are kept on disk and taken from there, unless `cached` is False.
    """
    found = _looked(target, traced=traced, mode=mode, cached=cached)
    return replace(found, notes=(*target.notes, *found.notes))


def _looked(target: Target, *, traced: bool, mode: str, cached: bool) -> Look:
    found = _look_at_file(target, traced=traced, mode=mode)
    if found is not None:
        return found
    key = cache_key(target, mode) if cached else None
    if key is not None and (kept := cache.get(key)) is not None:
        return Look(kept)
    from modelcli.live import opening, planning

    live = opening.open_live(target.source)
    told = len(live.notes)
    _apply_recipe(live, target)
    del live.notes[told:]  # what the edits had to say was said when they were made
    # What is kept has a forward pass in it, so that it answers every question.
    blueprint = planning.traced(live, mode) if traced or key is not None else live.describe()
    if key is not None:
        _keep_blueprint(key, blueprint)
    return Look(blueprint, tuple(live.notes), live.contents, live)


def known_blueprint(target: Target) -> Blueprint | None:
    """What is known of a model without torch and without running a line of anybody's: its file or the cache says it.

    The edits of a recipe are left out: hardly any of them changes a path.
    """
    target = _without_edits(target)
    found = _look_at_file(target, traced=False, mode="eval")
    if found is not None:
        return found.blueprint
    for source in (target.source, replace(target.source, input_size=None, input_dtype=())):  # the same modules
        key = cache_key(replace(target, source=source), "eval")
        if key is not None and (kept := cache.get(key)) is not None:
            return kept
    return None


def warm(name: str) -> None:
    """Keep the blueprint of a builder, if it is not kept yet. Raises RequestError where nothing may be kept, and
    SystemFailureError where nothing can."""
    if cache.is_off():
        raise RequestError("$MODELCLI_NO_CACHE is set: no blueprint would be kept", "unset MODELCLI_NO_CACHE")
    target = Target(Source(model=name))
    found = look(target, traced=True)
    if (key := cache_key(target, "eval")) is not None:
        cache.require(key, found.blueprint)


def cache_key(target: Target, mode: str) -> cache.Key | None:
    """The key of a builder or an expression of installed classes; None for what other code or a file decides."""
    source = target.source
    if cache.is_off() or target.edits or source.arch is not None or source.key is not None:
        return None
    if source.weights is not None and references.names_a_file(source.weights):
        return None
    reference = source.reference()
    if not isinstance(reference, Installed) or not reference.runs_only_installed_code:
        return None
    return cache.Key(str(reference), source.weights, source.input_size, source.input_dtype, mode)


def _look_at_file(target: Target, *, traced: bool, mode: str) -> Look | None:
    """A checkpoint's own account of itself, without torch; None where torch is needed to answer."""
    source = target.source
    if target.edits or source.arch is not None or not isinstance(reference := source.reference(), CheckpointFile):
        return None
    if source.weights not in (None, "none"):
        return None
    contents = checkpoints.read(reference.path, key=source.key)
    notes = list(contents.notes)
    record = contents.record
    if record is not None and (why := records.disagreement(record, contents.infos())):
        notes.append(f"the record in {reference.path.name} was ignored: {why}")
        record = None
    if record is None:
        notes += likeness_notes(contents)
        bare = contents.bare_blueprint()
        if traced:
            bare = bare.with_trace(Trace(None, reason="the file does not say its architecture: --arch names one"))
        return Look(bare, tuple(notes), contents)
    if traced and (source.input_size is not None or source.input_dtype or mode != "eval"):
        return None
    found = record.blueprint
    if traced and found.trace is None:
        found = found.with_trace(Trace(None, reason="the record in the file holds no forward pass"))
    return Look(found, tuple(notes), contents)


def likeness_notes(contents: Contents) -> list[str]:
    """Which torchvision builders a file that does not say its architecture fits exactly, as far as the cache knows."""
    if cache.is_off() or contents.types or not contents.tensors:
        return []
    known = cache.index(likeness.FINGERPRINTS)
    if not isinstance(known, dict) or len(contents.tensors) > 2 * known["most"]:  # what is larger need not be looked at
        return []
    shapes, _ = likeness.unwrapped(likeness.shapes_of(contents.infos().values()))
    names = known["models"].get(likeness.fingerprint(shapes))
    if not names:
        return []
    others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    return [f"{LOOKS_LIKE} {names[0]}{others}: --arch {shlex.quote(names[0])}"]


def _likeness_of(live: Live) -> list[str]:
    """The same of a model that was opened, where nothing has said its architecture, or what was said does not fit."""
    contents = live.contents
    fits = live.report is None or live.report.is_strict
    return [] if contents is None or live.record or (live.architecture and fits) else likeness_notes(contents)


@stdout_is_for_data
def values(found: Look, names: Sequence[str], *, whole: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The numbers of tensors: as nested lists where `whole`, and as one line each."""
    from modelcli.live import values as reading

    if found.live is not None:
        return reading.of_live(found.live, names, whole=whole)
    assert found.contents is not None
    return reading.of_contents(found.contents, names, whole=whole)


@stdout_is_for_data
def stats(found: Look, names: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, Statistics]:
    """Statistics of the numbers of tensors, by name: see `live.stats.collect`.

    `progress` is told how many bytes are done, and how many there are.
    """
    from modelcli.live import stats as reading

    if found.live is not None:
        return reading.of_live(found.live, names, progress)
    assert found.contents is not None
    return reading.of_contents(found.contents, names, progress)


@dataclass(frozen=True)
class Outcome:
    """What editing or saving came to. `output` is None where nothing was written."""

    blueprint: Blueprint
    changes: tuple[Mapping[str, Any], ...]
    before: Totals
    after: Totals
    check: Mapping[str, Any]
    written: Written | None = None
    notes: tuple[str, ...] = ()
    edits: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Writing:
    """Where to and how: `check` is `meta`, `run` or `none`; `bare` drops what stood around the state dict.

    `kind` is the format of `out`, told by how its name ends; the rest is what `writing.Care` says.
    """

    out: Path | None = None
    kind: str = "pth"
    force: bool = False
    dry_run: bool = False
    check: str = "meta"
    bare: bool = False
    durable: bool = True
    verify: bool = False
    max_shard_bytes: int | None = None
    report: Callable[[int, int, str], None] | None = None


@stdout_is_for_data
def edit(target: Target, added: Sequence[Edit], how: Writing, places: Sequence[str] = ()) -> Outcome:
    """Apply edits, check the result, and write it where `how` says so; the recipe, if any, gets the edits at the end.

    Nothing is written where anything is wrong. `places` are where edits stand that were read together: an error names
    the one that is wrong.
    """
    from modelcli import recipe, writing

    if how.out is not None:
        writing.check_target(how.out, how.kind, force=how.force)
    if target.recipe is not None:
        recipe.check_append(target.recipe, added)
    from modelcli.live import opening

    live = opening.open_live(target.source)
    told = len(live.notes)
    _apply_recipe(live, target)
    del live.notes[told:]  # what the recipe's edits had to say was said when they were made
    before = live.describe()
    live.changes.clear()
    live.origins.clear()
    _apply_each(live, added, places or [""] * len(added))
    check = _check(live, target, added, how)
    outcome = _outcome(live, target, before, check, added)
    if how.dry_run:
        return outcome
    if how.out is not None:
        outcome = _write(live, outcome, how.out, how)
    if target.recipe is not None:
        try:
            recipe.append(target.recipe, added)
        except ModelcliError as error:
            if outcome.written is not None:
                error.message += f"; {how.out} was written all the same, and the recipe is as it was"
            raise
    return outcome


@stdout_is_for_data
def save(target: Target, how: Writing) -> Outcome:
    """Apply the recipe's edits, check the result and write it."""
    from modelcli import writing

    assert how.out is not None
    writing.check_target(how.out, how.kind, force=how.force)
    from modelcli.live import opening

    live = opening.open_live(target.source)
    before = live.describe()
    _apply_recipe(live, target)
    if target.edits:
        check = _check(live, _without_edits(target), target.edits, how)
    else:
        check = {"ran": False, "reason": "nothing was edited", "output_shape": None, "input": None}
    outcome = _outcome(live, target, before, check, target.edits)
    return outcome if how.dry_run else _write(live, outcome, how.out, how)


def _without_edits(target: Target) -> Target:
    return replace(target, edits=(), places=())


def _apply_recipe(live: Live, target: Target) -> None:
    """Apply the edits that stand in a recipe already."""
    _apply_each(live, target.edits, target.places)


def _apply_each(live: Live, edits: Sequence[Edit], places: Sequence[str]) -> None:
    """Apply edits in order. Those that cannot be done are told together, each by where it stands and its line.

    Edits after a wrong one are tried on the model without it, so that what is said of them may come from that one.
    """
    wrong: list[ModelcliError] = []
    for edit, place in zip(edits, places, strict=True):
        try:
            live.apply([edit], place=place)
        except ModelcliError as error:
            if place:
                error.message = f"{place}: {str(edit)!r}: {error.message}"
            wrong.append(error)
            if not isinstance(error, RequestError):
                break
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        told = [f"{error.message} ({error.hint})" if error.hint else error.message for error in wrong]
        raise RequestError("\n".join(told), "mend the first one first: the others may come from it")


def _check(live: Live, target: Target, added: Sequence[Edit], how: Writing) -> dict[str, Any]:
    """Check that what `added` made of `target`, which is `live` now, still runs where `target` did."""
    try:
        result = _checked(live, target, added, how)
    except RequestError as error:
        error.notes = tuple(live.notes)
        raise
    if result.ran:
        live.notes += _idle(live, result.called)
    shapes = None if live.inputs is None else [list(size) for size in live.inputs.shapes]
    if not result.ran and result.reason and live.source.input_size is not None and how.check != "none":
        stated = ",".join(map(str, live.source.input_size[0]))
        live.notes.append(f"the check was not made with --input-size {stated}: is that right, the batch included?")
    return {"ran": result.ran, "reason": result.reason, "output_shape": result.output_shape, "input": shapes}


def _checked(live: Live, target: Target, added: Sequence[Edit], how: Writing) -> Check:
    from modelcli.live import check as checking
    from modelcli.live import opening, origins

    as_before = [kind.name for kind in origins.FITS_AS_BEFORE]
    edited = {change.path: change.action for change in live.changes if change.action not in as_before}
    if how.check == "none":
        return checking.Check(False, "--check none skips it")
    if live.architecture is None:
        return checking.Check(False, "no architecture is known: --arch names one")
    if how.check == "run":

        def really() -> Any:
            module, unedited = opening.open_real(target.source, target.edits)
            return module, unedited.inputs

        after, _ = opening.open_real(target.source, (*target.edits, *added))
        return checking.check(really, after, live.inputs, edited, device="cpu", origins=live.origins)

    def before() -> Any:
        unedited = opening.open_live(target.source)
        _apply_recipe(unedited, target)
        return unedited.module, unedited.inputs

    return checking.check(before, live.module, live.inputs, edited, origins=live.origins)


def _idle(live: Live, called: Collection[str]) -> list[str]:
    """New modules that the forward pass did not come to: a class calls the children that it knows.

    What stands in the place of another may be used otherwise (`out_proj` of an attention), or in train mode alone.
    """
    reached = {path for name in called for path in blueprints.ancestors(name)}
    there = {module.path: module for module in live.describe().modules}
    idle: dict[str, list[str]] = {}
    for change in live.changes:
        path = change.path
        if path in there and path not in reached and there[path].shared_with is None:
            idle.setdefault(change.action, []).append(path)
    replaced = idle.get("replace", [])
    told = []
    if replaced:
        them = "it" if len(replaced) == 1 else "them"
        names = blueprints.listed(replaced, 3)
        told.append(f"{names} did not run on the forward pass: the check says nothing of {them}")
    placed = [path for action in ("add", "insert", "append") for path in idle.get(action, ())]
    return told + [f"{path} did not run on the forward pass: nothing calls it" for path in placed]


def _outcome(live: Live, target: Target, before: Blueprint, check: Mapping[str, Any], added: Sequence[Edit]) -> Outcome:
    after = live.describe()
    changes = tuple(
        {
            "path": change.path,
            "action": change.action,
            "before": change.before,
            "after": change.after,
            "params_before": change.params_before,
            "params_after": change.params_after,
            **({} if change.nbytes is None else {"bytes_before": change.nbytes[0], "bytes_after": change.nbytes[1]}),
        }
        for change in live.changes
    )
    return Outcome(
        after,
        changes,
        before.totals,
        after.totals,
        check,
        notes=tuple(
            dict.fromkeys(
                (*target.notes, *live.notes, *_likeness_of(live), *_sum_note(changes, before.totals, after.totals))
            )
        ),
        edits=tuple(map(str, added)),
    )


def _sum_note(changes: Sequence[Mapping[str, Any]], before: Totals, after: Totals) -> list[str]:
    """Why the rows do not add up to what the totals say, where they do not: a row counts all that its module holds."""
    rows, total = sum(row["params_after"] - row["params_before"] for row in changes), after.params - before.params
    if rows == total:
        return []
    return [
        f"the rows add up to {rows:+,} params and the totals to {total:+,}: these count what has several names once"
    ]


def _write(live: Live, outcome: Outcome, out: Path, how: Writing) -> Outcome:
    from modelcli import writing
    from modelcli.live import planning

    plan = planning.plan(live, out, how.kind, bare=how.bare)
    size = writing.DEFAULT_SIZE if how.max_shard_bytes is None else how.max_shard_bytes
    care = writing.Care(how.force, how.durable, how.verify, how.report, size)
    written = writing.write(plan, out, care, kind=how.kind)
    notes = list(outcome.notes)
    if live.report is not None and live.report.missing:
        count = len(live.report.missing)
        what = "1 tensor is" if count == 1 else f"{count} tensors are"
        drawn = "was" if count == 1 else "were"
        notes.append(f"{what} not in the file, and {drawn} randomly initialised (--seed {live.seed})")
    if live.drawn:
        assert live.architecture is not None
        notes.append(f"{live.architecture.reference} was randomly initialised (--seed {live.seed})")
    if live.contents is not None and live.contents.key is not None:
        notes += _around(live, kept=plan.key is not None)
    return replace(outcome, written=written, notes=tuple(notes))


def _around(live: Live, *, kept: bool) -> list[str]:
    """What became of the rest of a training checkpoint, and what of it no longer fits."""
    from modelcli.live import around

    contents = live.contents
    assert contents is not None
    assert contents.key is not None
    beside = [str(name) for name in contents.tree if name != contents.key[0]] if isinstance(contents.tree, dict) else []
    rest = f"what {contents.path.name} holds beside {contents.key[0]!r} ({blueprints.listed(beside, 4)})"
    if not kept:
        return [f"{rest} was left out"]
    unfit = around.unfit(contents.tree, live.opened_with, dict(live.module.named_parameters()))
    changed = any(change.action not in ("freeze", "unfreeze") for change in live.changes)
    prefix = "" if live.report is None else live.report.prefix
    if prefix:
        unfit.append(
            f"the keys in {contents.key[0]!r} are written without {prefix!r}, and what wrote the file may ask for it "
            "(an edit without --arch leaves the keys as they are)"
        )
    renamed = around.renamed(live.opened_tensors, live.module)
    copies = around.other_copies(contents, live.describe(), prefix=prefix, changed=changed, renamed=renamed)
    return [f"{rest} was kept; --bare drops it", *unfit, *copies]


@stdout_is_for_data
def script(batch: Batch, out: Path, kind: str, *, bare: bool) -> Script:
    """The same work as a plain PyTorch script: see `live.scripting.script`. A note says where it would not run."""
    from modelcli.live import scripting

    edits = (*batch.target.edits, *batch.edits)
    places = (*batch.target.places, *batch.places)
    made = scripting.script(batch.target.source, edits, places, out, kind, bare=bare)
    made = replace(made, notes=(*batch.target.notes, *made.notes))
    if not edits:
        return made
    misfit = _misfit(replace(batch.target, edits=edits, places=places))
    return made if misfit is None else replace(made, notes=(*made.notes, misfit))


def _misfit(target: Target) -> str | None:
    """What the check before writing would refuse in an edited model."""
    from modelcli.live import opening

    live = opening.open_live(target.source)
    _apply_recipe(live, target)
    try:
        _check(live, _without_edits(target), target.edits, Writing())
    except RequestError as error:
        return f"the edited model does not fit, and modelcli itself would not write it: {error.message}"
    return None


@dataclass(frozen=True)
class Loaded:
    """How a model's keys fit. `error` is set where the load fails; then no recipe was written."""

    blueprint: Blueprint
    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mapping[str, Any], ...] = ()
    recipe: Path | None = None
    notes: tuple[str, ...] = ()
    error: ModelcliError | None = None


@stdout_is_for_data
def load(source: Source, recipe_path: Path, *, force: bool, dry_run: bool) -> Loaded:
    """Check that a model loads, and start the working recipe with it."""
    from modelcli import recipe
    from modelcli.live import opening

    # Missing and unexpected keys are shown, not raised: the command decides what they come to.
    live = opening.open_live(source, report_only=True)
    report = live.report
    error = None
    if report is not None and live.architecture is not None and live.contents is not None:
        error = report.refusal(live.contents, str(live.architecture.reference), strict=source.strict)
    elif live.architecture is not None and live.architecture.weights is not None:
        opening.load_weights(live)
    blueprint = live.describe()
    live.notes += _of_numbers(live)
    loaded = Loaded(
        blueprint=blueprint,
        matched=report.matched if report else sum(tensor.persistent for tensor in blueprint.tensors),
        missing=report.missing if report else (),
        unexpected=report.unexpected if report else (),
        mismatched=tuple(
            {"name": item.name, "expected": list(item.expected), "found": list(item.found)}
            for item in (report.mismatched if report else ())
        ),
        notes=(*live.notes, *_likeness_of(live)),
        error=error,
    )
    if error is not None or dry_run:
        return loaded
    if recipe_path.exists() and not force and (count := len(recipe.read(recipe_path).edits)):
        raise RequestError(
            f"{recipe_path} has {blueprints.counted(count, 'edit')}",
            "--force starts it anew; --recipe names another",
        )
    recipe.start(recipe_path, seen_from(source, recipe_path.parent))
    _keep(live, Target(source))
    return replace(loaded, recipe=recipe_path)


def _keep(live: Live, target: Target) -> None:
    """Keep the blueprint of a model that a recipe starts with: the next looks, and completion, take it from there."""
    from modelcli.live import planning

    key = cache_key(target, "eval")
    if key is not None and cache.get(key) is None:
        _keep_blueprint(key, planning.traced(live))


def _keep_blueprint(key: cache.Key, found: Blueprint) -> None:
    """Keep a blueprint, and of a builder by itself its fingerprint, so that files are known by it."""
    from modelcli.live import zoo

    cache.put(key, found)
    if key.weights in (None, "none") and key.reference in zoo.builder_names():
        fingerprints.add({key.reference: likeness.shapes_of(found.tensors)})


def _of_numbers(live: Live) -> list[str]:
    """Where the numbers of a loaded model come from, where that is not what its user may think."""
    base = live.architecture
    if live.drawn and base is not None and base.builder:
        return [f"the numbers of {base.reference} are random: --weights DEFAULT takes the pretrained ones"]
    if live.contents is not None and live.architecture is None:
        return [f"{live.contents.path} does not say its architecture: --arch names it, and edits are then checked"]
    return []


def seen_from(source: Source, folder: Path) -> Source:
    """A source with its relative paths as seen from another folder."""

    def moved(text: str | None) -> str | None:
        if text is None:
            return None
        try:
            reference = references.parse(text, source.folder)
        except ModelcliError:
            return text
        if isinstance(reference, PythonObject):
            return reference.relative_to(folder.resolve())
        if isinstance(reference, CheckpointFile):
            path = Path(text)
            if path.is_absolute():
                return text
            relative = os.path.relpath(reference.path.resolve(), folder.resolve()).replace(os.sep, "/")
            return relative if "/" in relative or Path(relative).suffix else f"./{relative}"
        return text

    model = moved(source.model)
    assert model is not None
    weights = source.weights
    if weights is not None and Path(source.folder / weights).is_file():
        weights = moved(weights)
    return replace(source, model=model, arch=moved(source.arch), weights=weights, folder=folder)


def select_tensors(
    blueprint: Blueprint,
    selected: Sequence[str],
    *,
    buffers: bool,
    frozen: bool,
    trainable: bool,
) -> list[blueprints.TensorInfo]:
    """The tensors to show: those selected, less buffers or flags that were not asked for."""
    tensors = list(blueprint.tensors)
    if selected:
        names = set(selectors.select_tensors(blueprint, selected))
        tensors = [tensor for tensor in tensors if tensor.name in names]
    if not buffers:
        tensors = [tensor for tensor in tensors if tensor.kind != "buffer"]
    if frozen or trainable:
        wanted = {False} if frozen and not trainable else {True} if trainable and not frozen else {True, False}
        tensors = [tensor for tensor in tensors if tensor.requires_grad in wanted]
    return tensors


def sort_tensors(
    tensors: Sequence[blueprints.TensorInfo], key: str, statistics: Mapping[str, Mapping[str, Any]] | None = None
) -> list[blueprints.TensorInfo]:
    """Tensors by a column or a statistic: words from A to Z, numbers from the largest, what has neither at the end.

    Zeros count by their share of the tensor.
    """

    def rank(tensor: blueprints.TensorInfo) -> tuple[bool, Any]:
        if key in ("elements", "bytes"):
            return False, -(tensor.elements if key == "elements" else tensor.nbytes)
        if statistics is None:
            word = getattr(tensor, key)
            return word is None, word
        number = statistics.get(tensor.name, {}).get(key)
        if number is None:
            return True, 0
        return False, -number / tensor.elements if key == "zeros" and number else -number

    return sorted(tensors, key=rank)


def undo(path: Path, count: int, *, dry_run: bool = False) -> list[str]:
    """Take back the last edits of a recipe. Raises RequestError where there are none."""
    from modelcli import recipe

    recipe.require(path)
    read = recipe.read(path)
    if not read.edits:
        raise RequestError(f"{path} has no edits to take back")
    if count > len(read.edits):
        raise RequestError(f"{path} has {len(read.edits)} to take back, not {count}")
    if dry_run:
        return [str(edit) for edit in read.edits[-count:]]
    return recipe.take_back(path, count)


def builders(pattern: str | None) -> list[dict[str, Any]]:
    """torchvision's builders that contain the pattern, or match it where it has a wildcard."""
    import fnmatch

    from modelcli.live import zoo

    names = zoo.builder_names()
    if pattern:
        glob = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
        chosen = [name for name in names if fnmatch.fnmatchcase(name, glob)]
        if not chosen:
            near = zoo.nearest_names(pattern)
            raise RequestError(f"no builder matches {pattern!r}", f"nearest: {', '.join(near)}" if near else None)
        names = chosen
    return [
        {
            "name": info.name,
            "params": info.params,
            "macs": info.macs,
            "weights": list(info.weights),
            "group": info.group,
        }
        for info in map(zoo.describe, names)
    ]
