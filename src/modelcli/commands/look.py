"""Get the blueprint of a model from a file, from the cache, or by building the model with torch.

Files and cached models need no torch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from modelcli import checkpoints, providers, resolve
from modelcli.checkpoints import Contents
from modelcli.checkpoints.contents import foreign_names
from modelcli.checkpoints.record import Record
from modelcli.commands.target import Target, without_edits
from modelcli.errors import ModelcliError, RequestError, SystemFailureError, UnsafeError
from modelcli.language.quoting import quoted
from modelcli.language.references import CheckpointFile, NamedModel, Source
from modelcli.model.blueprint import Blueprint, Trace

if TYPE_CHECKING:
    from modelcli.commands import blueprint_cache
    from modelcli.commands.editable import Editable
    from modelcli.commands.state_dict_models import OpenStateDict
    from modelcli.live.opening import Live


#: The beginning of the note that names the builders that a file fits.
LOOKS_LIKE = "looks like"

NO_ARCHITECTURE = "the file records no architecture: pass --arch REFERENCE"

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class LookRequest:
    """A model to show. With `traced`, the blueprint includes a forward pass in `mode`: `eval` or `train`.

    Without `cached`, a model that is not a file is built anew, and the cache is neither read nor written. Without
    `modules`, the caller shows only tensors: the blueprint of a plain state dict then has only the root module. With
    `of_files`, the caller asks for more of the model's files than a blueprint says, so the files are read. With
    `values`, the values will be read, so those of a model on the Hub are downloaded.
    """

    target: Target
    traced: bool = False
    mode: str = "eval"
    cached: bool = True
    modules: bool = True
    of_files: bool = False
    values: bool = False


@dataclass(frozen=True)
class Look:
    """A blueprint to show.

    Attributes:
        blueprint: the model.
        notes: notes for the user; `--quiet` hides them, but not `warnings`.
        contents: the checkpoint, if the model comes from one.
        live: the live model, if it was opened.
        keys: the state-dict model, if edits were applied to a file of unknown architecture.
        record: the file's record, if the blueprint comes from it and the model was not built to confirm it.
    """

    blueprint: Blueprint
    notes: tuple[str, ...] = ()
    contents: Contents | None = None
    live: Live | None = None
    record: Record | None = None
    keys: OpenStateDict | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        if self.contents is None or not self.contents.foreign:
            return ()
        names = foreign_names(self.contents.foreign, most=20)
        return (f"{self.contents.path} also holds objects of {names}: none was loaded, the tensors are shown",)

    @property
    def foreign(self) -> tuple[str, ...]:
        """The names of classes in the file that could only be loaded by running code."""
        return () if self.contents is None else self.contents.foreign


def stdout_is_for_data(function: Callable[P, R]) -> Callable[P, R]:
    """Redirect what a model's own code prints to standard error, because standard output is for data."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.redirect_stdout(sys.stderr):
            return function(*args, **kwargs)

    return call


@stdout_is_for_data
def look(request: LookRequest) -> Look:
    """Return the blueprint of a model with its recipe's edits.

    Blueprints of installed models are cached on disk.
    """
    target, traced = request.target, request.traced
    with target.notes_in_errors():
        found = _looked(request)
    made = found.blueprint.trace if traced else None
    return replace(found, notes=(*target.notes, *found.notes, *(made.notes if made is not None else ())))


def _looked(request: LookRequest) -> Look:
    target, traced, mode = request.target, request.traced, request.mode
    named = resolve.downloaded(target.source) if request.values else resolve.pinned(target.source)
    target = replace(target, source=named)
    found = _look_at_file(target, traced=traced, mode=mode, modules=request.modules)
    if found is not None:
        return found
    from modelcli.commands import blueprint_cache

    key = cache_key(target, mode) if request.cached else None
    if key is not None and key.identity is not None and request.of_files:
        key = None
    if key is not None and (cached := blueprint_cache.get_with_notes(key)) is not None:
        hidden = resolve.hidden_file_note(target.source.model, target.source.folder)
        return Look(cached.blueprint, cached.notes if hidden is None else (hidden, *cached.notes))
    from modelcli.commands.applied_edits import apply_each
    from modelcli.commands.editable import opened_keys

    if (keys := opened_keys(target.source)) is not None:
        apply_each(keys, target.edits, target.locations)  # its notes were shown when the edits were made
        blueprint = keys.describe()
        if traced:
            blueprint = blueprint.with_trace(keys.trace)
        return Look(blueprint, (*keys.notes, *keys.unseen_notes()), keys.contents, keys=keys)
    from modelcli.live import apart, downloads, opening, planning

    with downloads.forbidden():
        live = opening.open_live(target.source)
        apply_each(live, target.edits, target.locations)  # its notes were shown when the edits were made
        # A cached blueprint always includes a forward pass, so that it serves every command.
        with_values = traced or live.contents is None  # nobody asked for a pass that reads the weights
        makes_pass = traced or key is not None
        blueprint = planning.traced(live, mode, with_values=with_values) if makes_pass else live.describe_loaded()
    found = Look(blueprint, (*live.notes, *apart.note_of(live.module)), live.contents, live)
    if key is not None and key.identity is None:
        keep_blueprint(key, blueprint)
    elif key is not None and _can_be_kept(found, traced=traced) and cache_key(target, mode) == key:
        blueprint_cache.put(key, blueprint, found.notes)
    return found


def _can_be_kept(found: Look, *, traced: bool) -> bool:
    """Whether the blueprint of a model with files answers what was asked, and what the next look may ask."""
    trace, contents = found.blueprint.trace, found.contents
    has_more = contents is not None and (contents.foreign or contents.extras or contents.unseen or contents.hidden)
    return trace is not None and (traced or trace.reason is None) and not has_more


def _look_at_file(target: Target, *, traced: bool, mode: str, modules: bool = True) -> Look | None:
    """Return the look at a checkpoint without torch; None if torch is needed."""
    source = target.source
    if target.edits or source.arch is not None:
        return None
    if not isinstance(reference := resolve.reference_of(source), CheckpointFile):
        return None
    if source.weights not in (None, "none"):
        return None
    contents = checkpoints.read(reference.path, key=source.key)
    if source.bare_keys:
        contents = contents.without_record()
    notes = list(contents.notes)
    if (unknown := resolve.keys_alone_note(reference.path, source)) is not None:
        notes.append(unknown)
    record = contents.record
    if record is not None and (why := resolve.disagreement(record, contents)):
        notes.append(f"the record in {reference.path.name} was ignored: {why}")
        record = None
    if record is None:
        notes += fitting_model_notes(contents)
        bare = contents.bare_blueprint() if modules else contents.tensors_in_root()
        if traced:
            bare = bare.with_trace(Trace(None, reason=NO_ARCHITECTURE, device=None))
        return Look(bare, tuple(notes), contents)
    if traced and (source.input_size is not None or source.input_dtype or source.inputs or mode != "eval"):
        return None
    if traced and _may_run(record, source):
        return None
    found = record.blueprint
    if traced and found.trace is None:
        found = found.with_trace(Trace(None, reason="the record in the file contains no forward pass", device=None))
    return Look(found, tuple(notes), contents, record=record)


def without_record(found: Look) -> Blueprint:
    """Return the blueprint of a file without its record: its tensors, and modules from their names."""
    assert found.contents is not None
    return found.contents.bare_blueprint()


@stdout_is_for_data
def built(target: Target, found: Look, *, traced: bool) -> tuple[Look, str | None]:
    """Build the architecture that a file records, and return the look at it.

    If that would run code that is not trusted, or if the record names no architecture, the given look is returned, and
    the second value says why. If the architecture does not fit the tensors, the record is ignored, with a note.
    """
    assert found.record is not None
    assert found.contents is not None
    if found.record.reference is None:
        return found, "it names no architecture"
    if found.contents.foreign:
        return found, "the file holds more than tensors"
    from modelcli.live import opening, planning

    try:
        live = opening.open_live(target.source)
        blueprint = planning.traced(live) if traced else live.describe_loaded()
    except UnsafeError as error:
        return found, f"{error.message} ({error.hint})"
    except SystemFailureError:
        raise
    except ModelcliError as error:
        notes = (*found.notes, f"the record in {found.contents.path.name} was ignored: {error.message}")
        bare = without_record(found)
        if traced:
            bare = bare.with_trace(Trace(None, reason=NO_ARCHITECTURE, device=None))
        return Look(bare, tuple(dict.fromkeys(notes)), found.contents), None
    notes = (*found.notes, *live.notes)
    if _outline(blueprint) != _outline(found.blueprint):
        notes = (
            *notes,
            f"the record in {found.contents.path.name} describes another model than it names: the named one was built",
        )
    return Look(blueprint, tuple(dict.fromkeys(notes)), found.contents, live), None


def _outline(blueprint: Blueprint) -> tuple[object, ...]:
    """Return the modules and tensors of a blueprint, to compare two blueprints."""
    modules = [(module.path, module.type) for module in blueprint.modules]
    return modules, [(t.name, t.shape, t.dtype, t.kind, t.requires_grad, t.persistent) for t in blueprint.tensors]


def _may_run(record: Record, source: Source) -> bool:
    """Whether a forward pass that failed when the record was written should be tried with values."""
    made = record.blueprint.trace
    if made is None or made.reason is None or made.inputs is None or record.reference is None:
        return False
    return source.trust or resolve.record_runs_known_code(record)


@stdout_is_for_data
def torchinfo_table(target: Target, *, mode: str, depth: int | None) -> str:
    """Return torchinfo's table of a model with its recipe's edits. Raises RequestError if torchinfo fails."""
    from modelcli.commands.applied_edits import apply_each
    from modelcli.commands.editable import opened_keys

    if opened_keys(target.source) is not None:
        raise RequestError(
            "torchinfo needs a model that can run, but the architecture is not known", "pass --arch REFERENCE"
        )
    from modelcli.live import downloads, opening, torchinfo_table

    with downloads.forbidden():
        live = opening.open_live(target.source)
        apply_each(live, target.edits, target.locations)
        return torchinfo_table.table(live, mode=mode, depth=depth)


def known_blueprint(target: Target) -> Blueprint | None:
    """Return the blueprint of a model from its file or the cache, without torch and without running any model code.

    The edits of a recipe are not applied, since few of them change a path.
    """
    target = without_edits(target)
    found = _look_at_file(target, traced=False, mode="eval")
    if found is not None:
        return found.blueprint
    for source in (
        pinned := resolve.pinned(target.source, requests=False),
        replace(pinned, input_size=None, input_dtype=(), inputs=()),
    ):  # the same modules
        from modelcli.commands import blueprint_cache

        key = cache_key(replace(target, source=source), "eval")
        if key is not None and (kept := blueprint_cache.get(key)) is not None:
            return kept
    return None


def cache_key(target: Target, mode: str) -> blueprint_cache.Key | None:
    """Return the cache key of a builder or an expression of installed classes; None for other models."""
    from modelcli.commands import blueprint_cache
    from modelcli.providers import known_code

    source = target.source
    if blueprint_cache.is_off() or target.edits or source.arch is not None or source.key is not None:
        return None
    reference = resolve.reference_of(source)
    if not isinstance(reference, NamedModel):
        return None
    identity = _identity(reference, source)
    if identity is None and not known_code.runs_known_code(reference):
        return None
    if source.weights is not None and resolve.names_a_file(source.weights, source.folder, source.model):
        return None
    return blueprint_cache.Key(
        *(str(reference), source.weights, source.input_size, source.input_dtype, mode, source.inputs),
        prefix=reference.prefix,
        identity=identity,
    )


def _identity(reference: NamedModel, source: Source) -> str | None:
    """What decides a model that is named by its files; None where its name does, or where other code may run."""
    from modelcli.providers import known_code

    provider = None if reference.prefix is None else providers.by_prefix(reference.prefix)
    is_plain = source.strict and not (source.trust or source.tensors_only or source.bare_keys)
    if provider is None or not is_plain or not known_code.has_known_arguments(reference):
        return None
    return provider.identity(reference.call.name, source.folder)


def keep_blueprint(key: blueprint_cache.Key, found: Blueprint) -> None:
    """Cache a blueprint, and the fingerprint of a named model without arguments, to recognise files by."""
    from modelcli.commands import blueprint_cache, known_builders
    from modelcli.model import state_dict_match

    blueprint_cache.put(key, found)
    known = providers.names() if key.prefix is None else providers.names_after(key.prefix)
    if key.weights in (None, "none") and key.reference in known:
        known_builders.add({key.reference: state_dict_match.shapes_of(found.tensors)})


def fitting_model_notes(contents: Contents) -> list[str]:
    """Return notes on the cached models that a file without a recorded architecture fits exactly."""
    if contents.types or not contents.tensors:
        return []
    from modelcli.commands import blueprint_cache, known_builders

    if blueprint_cache.is_off():
        return []

    names = known_builders.fitting(contents)
    if not names:
        return []
    label = "" if providers.prefix_of(names[0]) is not None else f"{providers.with_names()} "
    others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    return [f"{LOOKS_LIKE} {label}{names[0]}{others}: --arch {quoted(names[0])}"]


def architecture_notes(live: Live | Editable) -> list[str]:
    """Return the same notes for an opened model whose architecture is unknown or does not fit."""
    contents = live.contents
    fits = live.report is None or live.report.is_strict
    return [] if contents is None or live.record or (live.architecture and fits) else fitting_model_notes(contents)
