"""Check that a model loads, and start a recipe with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli import resolve
from modelcli.commands import blueprint_cache
from modelcli.commands.editable import opened_keys
from modelcli.commands.look import architecture_notes, cache_key, keep_blueprint, stdout_is_for_data
from modelcli.commands.target import Target, notes_of_python, seen_from
from modelcli.errors import ModelcliError, RequestError
from modelcli.language.references import Source
from modelcli.model.blueprint import Blueprint
from modelcli.model.state_dict_match import Mismatch
from modelcli.wording import counted

if TYPE_CHECKING:
    from modelcli.live.opening import Live


@dataclass(frozen=True)
class LoadRequest:
    """The model, and the recipe to start. `force` replaces a recipe that has edits; `dry_run` writes no recipe."""

    source: Source
    recipe: Path
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class LoadResult:
    """How a checkpoint's keys fit the architecture. If the load fails, `error` is set and no recipe was written."""

    reference: str
    blueprint: Blueprint
    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    recipe: Path | None = None
    notes: tuple[str, ...] = ()
    error: ModelcliError | None = None


@stdout_is_for_data
def load(request: LoadRequest) -> LoadResult:
    """Check that a model loads, and start the working recipe with it."""
    source = request.source
    keys = opened_keys(source)
    if keys is None and (downloaded := resolve.downloaded(source)) != source:
        source = downloaded
        keys = opened_keys(source)  # what was on the Hub may be quantized
    if keys is not None:
        blueprint = keys.describe()
        path = keys.contents.path
        unknown = [f"{path} records no architecture: pass --arch REFERENCE, so that modelcli can check edits"]
        loaded = LoadResult(
            reference=source.model,
            blueprint=blueprint,
            matched=sum(tensor.persistent for tensor in blueprint.tensors),
            notes=(*keys.notes, *(unknown if keys.own_folder is None else ()), *architecture_notes(keys)),
        )
        return loaded if request.dry_run else _started(request, loaded)
    from modelcli.live import opening

    # Keys that do not match are in the result: the command shows them, and then raises its `error`.
    live = opening.open_live(source, report_only=True)
    report = live.report
    error = None
    if report is not None and live.architecture is not None and live.contents is not None:
        error = report.refusal(
            live.contents,
            str(live.architecture.reference),
            strict=source.strict,
            follows_record=live.record is not None and source.arch is None,
        )
    elif live.architecture is not None and live.architecture.weights is not None:
        opening.load_weights(live)
    blueprint = live.describe_loaded()
    loaded = LoadResult(
        reference=source.model,
        blueprint=blueprint,
        matched=report.matched if report else sum(tensor.persistent for tensor in blueprint.tensors),
        missing=report.missing if report else (),
        unexpected=report.unexpected if report else (),
        mismatched=report.mismatched if report else (),
        notes=(*live.notes, *_value_notes(live), *architecture_notes(live)),
        error=error,
    )
    if error is not None or request.dry_run:
        return loaded
    loaded = _started(request, loaded)
    _keep(live, Target(source))
    return loaded


def _started(request: LoadRequest, loaded: LoadResult) -> LoadResult:
    """Start the working recipe with a model that loads."""
    from modelcli import recipe

    source, recipe_path = request.source, request.recipe
    with recipe.locked(recipe_path):
        if recipe_path.exists() and not request.force and (count := len(recipe.read(recipe_path).edits)):
            raise RequestError(
                f"{recipe_path} has {counted(count, 'edit')}",
                "--force starts over; --recipe names another file",
            )
        started = seen_from(source, recipe_path.parent)
        recipe.start(recipe_path, started)
    notes_of_python(recipe_path, started, (), own=True)
    return replace(loaded, recipe=recipe_path)


def _keep(live: Live, target: Target) -> None:
    """Cache the blueprint of a recipe's model for the next commands and for completion."""
    from modelcli.live import planning

    key = cache_key(target, "eval")
    if key is not None and key.identity is None and blueprint_cache.get(key) is None:
        keep_blueprint(key, planning.traced(live, with_values=True))


def _value_notes(live: Live) -> list[str]:
    """Return notes on where the values come from, if the user may expect something else."""
    base = live.architecture
    if live.drawn and base is not None and base.pretrained:
        return [f"the values of {base.reference} are random: pass --weights DEFAULT for pretrained ones"]
    return []
