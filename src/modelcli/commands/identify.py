"""Find the known models that a checkpoint fits, by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelcli import providers, resolve
from modelcli.commands import blueprint_cache, known_builders
from modelcli.commands.look import LOOKS_LIKE, Look, LookRequest, cache_key, look, stdout_is_for_data
from modelcli.commands.target import Target
from modelcli.errors import ModelcliError, RequestError, SystemFailureError
from modelcli.language.quoting import quoted
from modelcli.language.references import CheckpointFile, NamedModel, Reference, Source
from modelcli.model import state_dict_match
from modelcli.model.state_dict_match import LISTING, Match, Shapes
from modelcli.model.tensors import Shape
from modelcli.providers import configuration
from modelcli.wording import counted

#: How many models to show if none fits exactly.
MOST = 3

#: At most this many tensors of shapes that a model does not have in the end are registered while it is built.
_DROPPED = 10

#: The cache entry for the models that files fit exactly, and of how many files it tells.
_ANSWERS, _MOST_ANSWERS = "exact matches", 200

#: Iterates over names, each of which takes a while, and may show the progress.
Steps = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class IdentifyRequest:
    """A checkpoint, and the key of the state dict in it if it contains several."""

    checkpoint: str
    key: str | None = None


@dataclass(frozen=True)
class ConfiguredModel:
    """The model that the configuration of a folder describes.

    Attributes:
        architecture: the name that the library has for it, `resnet18`, else its class, `BertForMaskedLM`.
        library: the library that has it.
    """

    architecture: str
    library: str


@dataclass(frozen=True)
class IdentifyResult:
    """The models that a checkpoint fits exactly, else the closest ones, best first. There may be none.

    `configured` is what the configuration of a folder says, where that is the only match.
    """

    look: Look
    matches: tuple[Match, ...]
    notes: tuple[str, ...] = ()
    configured: ConfiguredModel | None = None


def identify(request: IdentifyRequest, steps: Steps = iter) -> IdentifyResult:
    """Compare a checkpoint with every named model. Models that are not in the cache are built on the meta device.

    A folder with a library's model is compared with the model that its configuration describes; with every named model
    only if that cannot be built, or has other tensors. Prefixes of wrappers are removed.

    Raises RequestError for anything but a checkpoint or a folder with a model, and for a folder without weights.
    """
    checkpoint = request.checkpoint
    source = Source(checkpoint, key=request.key)
    reference, why_not = resolve.reference_of(source), []
    if not isinstance(reference, CheckpointFile):
        folder = resolve.own_folder(reference, source)
        if folder is None:
            raise RequestError(
                f"{checkpoint} is a model reference, not a checkpoint", "name a file or a folder: best.pth"
            )
        try:
            return _by_configuration(source, reference, folder)
        except _NotAsConfiguredError as error:
            why_not.append(str(error))
        source = Source(str(folder), key=request.key, bare_keys=True)
    found = look(LookRequest(Target(source), of_files=True))
    shapes, unwrapping = state_dict_match.unwrapped(state_dict_match.shapes_of(found.blueprint.tensors))
    matches, problems = _compared(shapes, steps)
    notes = [*why_not, *(note for note in found.notes if not note.startswith(LOOKS_LIKE)), *problems]
    if unwrapping:
        notes.append(unwrapping.note())
    if matches:
        first = matches[0]
        words = f"--arch {quoted(first.model)}"
        if first.exact:
            notes.append(f"{words} fits: modelcli load {quoted(checkpoint)} {words}")
        elif (fitting := _with_classes(first, shapes)) is not None:
            notes.append(f"{fitting} fits exactly: modelcli load {quoted(checkpoint)} --arch {quoted(fitting)}")
    return IdentifyResult(found, tuple(matches), tuple(notes))


class _NotAsConfiguredError(Exception):
    """The configuration of a folder does not say what its tensors are. The message is a note that says why."""


@stdout_is_for_data
def _by_configuration(source: Source, reference: Reference, folder: Path) -> IdentifyResult:
    """Compare the weights in a folder with the model that its configuration describes, built on the meta device.

    Raises _NotAsConfiguredError where the model cannot be built, or is not close to the tensors; RequestError for a
    folder without weights.
    """
    from modelcli.live import downloads, opening

    try:
        with downloads.forbidden():
            live = opening.open_live(source, report_only=True)
    except SystemFailureError:
        raise
    except ModelcliError as error:
        why = f"the configuration of {source.model} was not compared: {error.message}"
        raise _NotAsConfiguredError(f"{why} ({error.hint})" if error.hint else why) from None
    report = live.report
    if live.architecture is None or live.contents is None or report is None:
        raise RequestError(
            f"{source.model} holds no weights, so there is nothing to identify",
            f"modelcli summary {quoted(source.model)} shows what its configuration describes",
        )
    match = Match(str(reference), report.matched, report.missing, report.unexpected, report.mismatched)
    named = (configuration.configuration_in(folder) or {}).get("architecture")
    configured = ConfiguredModel(
        named if isinstance(named, str) else type(live.module).__name__, live.architecture.provider.provider.name
    )
    if not match.is_close:
        raise _NotAsConfiguredError(
            f"the configuration of {source.model} describes {configured.architecture} of {configured.library}, "
            f"which has {counted(match.matched, 'tensor')} in common with the files"
        )
    text = quoted(source.model)
    note = (
        f"the configuration fits: modelcli load {text}"
        if match.exact
        else f"the configuration does not fit: modelcli check {text} --arch-check lists what differs"
    )
    found = Look(live.describe_loaded(), tuple(live.notes), live.contents, live)
    return IdentifyResult(found, (match,), (*live.notes, note), configured)


def _compared(shapes: Shapes, steps: Steps) -> tuple[list[Match], list[str]]:
    """The matches of a file among all models, and what could not be compared.

    Building a model ends as soon as it has more tensors of other shapes than a match may have: first than one that fits
    exactly, and then, if none does, than the closest ones so far. What is left out would not be shown.
    """
    exactly = _Limit(shapes, lambda: 0)
    models, problems = _models_that_may_fit(steps, exactly)
    if not _has_exact(shapes, models):
        more, unavailable = _models_of_large_libraries(steps, exactly)
        if not _has_exact(shapes, more):
            models, problems = _models(steps)
            if not _is_found(state_dict_match.best(shapes, models, MOST)):
                found = models | more
                nearly = _Limit(shapes, lambda: _most_others(shapes, found), found)
                more, unavailable = _models_of_large_libraries(steps, nearly)
        models |= more
        problems += unavailable
    return state_dict_match.best(shapes, models, MOST), problems


def keep(names: Sequence[str], *, complete: bool) -> None:
    """Cache the names and shapes of these models, and their fingerprints. `complete`: these are all named models."""
    groups = _by_prefix(names)
    if complete:
        groups = {prefix: [] for prefix in _prefixes()[0]} | groups
    for prefix, group in groups.items():
        listed = _kept(prefix)
        built, problems = _built([name for name in group if name not in listed], iter)
        _keep(prefix, listed | built, complete=complete and not problems)


def _prefixes() -> tuple[list[str | None], tuple[str, ...]]:
    """Return the prefixes of all providers with named models, and the errors of those that failed."""
    found = providers.everything()
    compared = [known for known in found.providers if known.has_names and not known.has_many_models]
    return list(dict.fromkeys(known.prefix for known in compared)), found.problems


@dataclass(frozen=True)
class _Limit:
    """When to give up building a model.

    Attributes:
        shapes: the tensors of the file.
        most_others: gives how many tensors of another shape a model may have.
        found: gets each model that was built, so that `most_others` can go by it.
    """

    shapes: Shapes
    most_others: Callable[[], int]
    found: dict[str, Shapes] = field(default_factory=dict)


def _models_of_large_libraries(steps: Steps, limit: _Limit) -> tuple[dict[str, Shapes], list[str]]:
    """The tensors of those models that a checkpoint may belong to, of libraries that have too many to build them all.

    The second value says what could not be compared.
    """
    found: dict[str, Shapes] = {}
    problems: list[str] = []
    for provider in providers.everything().providers:
        if not (provider.has_many_models and provider.is_installed):
            continue
        kept = {} if blueprint_cache.is_off() else _kept(provider.prefix)
        names = [f"{provider.prefix}:{name}" for group in provider.names_like(limit.shapes) for name in group]
        found |= {name: kept[name] for name in names if name in kept}
        limit.found.update(found)
        built, failed = _built([name for name in names if name not in limit.found], steps, limit)
        found |= built
        problems += failed.values()
        if built and not blueprint_cache.is_off():
            _keep(provider.prefix, kept | built, complete=False)
    return found, problems


def _most_others(shapes: Shapes, models: dict[str, Shapes]) -> int:
    """How many tensors of other shapes a model may have that would be shown beside these.

    At least half of its tensors match, so that there are no more others than the file has tensors.
    """
    near = state_dict_match.best(shapes, models, MOST)
    return min(len(shapes), near[-1].distance if len(near) == MOST else len(shapes))


def _has_exact(shapes: Shapes, models: dict[str, Shapes]) -> bool:
    return bool(_exact(shapes, models))


def _exact(shapes: Shapes, models: dict[str, Shapes]) -> list[Match]:
    return [match for match in state_dict_match.best(shapes, models, 1) if match.exact]


def _is_found(matches: Sequence[Match]) -> bool:
    """Whether the best match is exact, or needs no more than another number of classes."""
    return bool(matches) and (matches[0].exact or _other_classes(matches[0]) is not None)


def _by_prefix(names: Sequence[str]) -> dict[str | None, list[str]]:
    groups: dict[str | None, list[str]] = {}
    for name in names:
        groups.setdefault(providers.prefix_of(name), []).append(name)
    return groups


def _models(steps: Steps) -> tuple[dict[str, Shapes], list[str]]:
    """Return the tensors of every known model by its reference, and notes on what could not be compared."""
    found, problems = _prefixes()
    kept = {prefix: {} if blueprint_cache.is_off() else _kept(prefix) for prefix in found}
    missing, unavailable = _missing(kept)
    built, failed = _built([name for names in missing.values() for name in names], steps)
    for name, shapes in built.items():
        kept[providers.prefix_of(name)][name] = shapes
    for prefix in missing if not blueprint_cache.is_off() else ():
        _keep(prefix, kept[prefix], complete=not any(name in failed for name in missing[prefix]))
    return _joined(kept), [*problems, *unavailable, *failed.values()]


def _models_that_may_fit(steps: Steps, limit: _Limit) -> tuple[dict[str, Shapes], list[str]]:
    """The same without the models beyond a limit. Those that fit exactly are remembered for the next time."""
    found, problems = _prefixes()
    answer = state_dict_match.fingerprint(limit.shapes)
    kept = {prefix: {} if blueprint_cache.is_off() else _kept(prefix) for prefix in found}
    answers = {prefix: {} if blueprint_cache.is_off() else _answers(prefix) for prefix in found}
    for prefix in found:
        kept[prefix] |= dict.fromkeys(answers[prefix].get(answer, ()), limit.shapes)
    missing, unavailable = _missing({prefix: kept[prefix] for prefix in found if answer not in answers[prefix]})
    built, failed = _built([name for names in missing.values() for name in names], steps, limit)
    for name, shapes in built.items():
        kept[providers.prefix_of(name)][name] = shapes
    if not blueprint_cache.is_off():
        for prefix in missing if not failed else ():
            exact = [match.model for match in _exact(limit.shapes, kept[prefix])]
            blueprint_cache.put_index(
                _ANSWERS, dict([*answers[prefix].items(), (answer, exact)][-_MOST_ANSWERS:]), prefix
            )
        if built:
            known_builders.add(built)
    return _joined(kept), [*problems, *unavailable, *failed.values()]


def _missing(kept: Mapping[str | None, dict[str, Shapes]]) -> tuple[dict[str | None, list[str]], list[str]]:
    """The models of each prefix that the cache does not have, and what could not be asked for its models."""
    missing: dict[str | None, list[str]] = {}
    problems = []
    for prefix in kept:
        if blueprint_cache.is_off() or not _is_complete(prefix):
            try:
                missing[prefix] = [name for name in _names(prefix) if name not in kept[prefix]]
            except SystemFailureError as error:
                problems.append(error.message)
    return missing, problems


def _joined(kept: Mapping[str | None, dict[str, Shapes]]) -> dict[str, Shapes]:
    return {name: shapes for models in kept.values() for name, shapes in models.items()}


def _answers(prefix: str | None) -> dict[str, list[str]]:
    """The models that fit exactly, by the fingerprints of files that were compared with all of them."""
    kept = blueprint_cache.index(_ANSWERS, prefix)
    return kept if isinstance(kept, dict) else {}


def _names(prefix: str | None) -> list[str]:
    """Return the references to all models of the providers with this prefix (None: without one)."""
    from modelcli.live import providers as halves

    named = providers.built_in() if prefix is None else filter(None, [providers.by_prefix(prefix)])
    found: list[str] = []
    for provider in named:
        with halves.blamed(provider):
            half = halves.half_of(provider)
            found += [half.reference_to(name) for name in half.names()]
    return found


def _is_complete(prefix: str | None) -> bool:
    kept = blueprint_cache.index(LISTING, prefix)
    return isinstance(kept, dict) and bool(kept["complete"])


def _kept(prefix: str | None) -> dict[str, Shapes]:
    kept = blueprint_cache.index(LISTING, prefix)
    if not isinstance(kept, dict):
        return {}
    return {model: {name: tuple(shape) for name, shape in shapes.items()} for model, shapes in kept["models"].items()}


def _keep(prefix: str | None, models: dict[str, Shapes], *, complete: bool) -> None:
    complete = complete or _is_complete(prefix)
    blueprint_cache.put_index(LISTING, {"complete": complete, "models": models}, prefix)
    known_builders.add(models)


@stdout_is_for_data
def _built(names: Sequence[str], steps: Steps, limit: _Limit | None = None) -> tuple[dict[str, Shapes], dict[str, str]]:
    """Return the tensors of models, also built with the arguments that published weights may have been made with.

    A model beyond the limit is left out. The second value has the errors of models of other packages that cannot be
    built, by name.
    """
    made: dict[str, Shapes] = {}
    failed: dict[str, str] = {}
    for name in steps(names) if names else ():
        try:
            for text in _variants(name):
                if (shapes := _shapes(text) if limit is None else _shapes_within(text, limit)) is not None:
                    made[text] = shapes
        except ModelcliError as error:
            if providers.prefix_of(name) is None:
                raise
            failed[name] = f"{name} was not compared: {error.message}"
    return made, failed


def _shapes_within(reference: str, limit: _Limit) -> Shapes | None:
    """The tensors of a model; None where building it ended at the limit."""
    from modelcli.live import unfit_builds

    try:
        # Constructors also register some tensors that the model does not keep.
        with unfit_builds.given_up({*limit.shapes.values()}, limit.most_others() + _DROPPED):
            shapes = _shapes(reference)
    except unfit_builds.UnfitError:
        return None
    limit.found[reference] = shapes
    return shapes


def _variants(reference: str) -> list[str]:
    from modelcli.live import providers as halves

    found = resolve.parse(reference)
    assert isinstance(found, NamedModel)
    half = halves.provider_of(found)
    with halves.blamed(half.provider):
        return [half.reference_to(text) for text in half.variants(found.call.name)]


def _shapes(reference: str) -> dict[str, Shape]:
    source = Source(reference)
    key = cache_key(Target(source), "eval")
    blueprint = None if key is None else blueprint_cache.get(key)
    if blueprint is None:
        from modelcli.live import opening

        blueprint = opening.open_live(source).describe()
    return state_dict_match.shapes_of(blueprint.tensors)


@stdout_is_for_data
def _with_classes(match: Match, shapes: Shapes) -> str | None:
    """Return the reference with another number of classes, if only a replaced head does not fit; else None."""
    if (classes := _other_classes(match)) is None:
        return None
    builder, _, arguments = match.model.removesuffix(")").partition("(")
    text = f"{builder}({f'{arguments}, ' if arguments else ''}num_classes={classes})"
    try:
        return text if state_dict_match.compare(text, _shapes(text), shapes).exact else None
    except RequestError:
        return None


def _other_classes(match: Match) -> int | None:
    """The first size of all tensors that do not fit, if nothing else differs: the number of classes."""
    counts = {item.found[0] if item.found else None for item in match.mismatched}
    return counts.pop() if len(counts) == 1 and not (match.missing or match.unexpected) else None
