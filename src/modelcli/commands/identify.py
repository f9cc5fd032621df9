"""Find the known models that a checkpoint fits, by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from modelcli import providers, resolve
from modelcli.commands import blueprint_cache, known_builders
from modelcli.commands.look import LOOKS_LIKE, Look, LookRequest, cache_key, look, stdout_is_for_data
from modelcli.commands.target import Target
from modelcli.errors import ModelcliError, RequestError, SystemFailureError
from modelcli.language.quoting import quoted
from modelcli.language.references import CheckpointFile, NamedModel, Source
from modelcli.model import state_dict_match
from modelcli.model.state_dict_match import LISTING, Match, Shapes
from modelcli.model.tensors import Shape

#: How many models to show if none fits exactly.
MOST = 3

#: Iterates over names, each of which takes a while, and may show the progress.
Steps = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class IdentifyRequest:
    """A checkpoint, and the key of the state dict in it if it contains several."""

    checkpoint: str
    key: str | None = None


@dataclass(frozen=True)
class IdentifyResult:
    """The models that a checkpoint fits exactly, else the closest ones, best first. There may be none."""

    look: Look
    matches: tuple[Match, ...]
    notes: tuple[str, ...] = ()


def identify(request: IdentifyRequest, steps: Steps = iter) -> IdentifyResult:
    """Compare a checkpoint with every named model. Models that are not in the cache are built on the meta device.

    Prefixes of wrappers are removed. Raises RequestError for anything but a checkpoint.
    """
    checkpoint = request.checkpoint
    source = Source(checkpoint, key=request.key)
    if not isinstance(resolve.reference_of(source), CheckpointFile):
        raise RequestError(f"{checkpoint} is a model reference, not a checkpoint", "name a file: best.pth")
    found = look(LookRequest(Target(source), of_files=True))
    shapes, unwrapping = state_dict_match.unwrapped(state_dict_match.shapes_of(found.blueprint.tensors))
    models, problems = _models(steps)
    matches = state_dict_match.best(shapes, models, MOST)
    if not _is_found(matches):
        more, unavailable = _models_of_large_libraries(shapes, steps)
        matches = state_dict_match.best(shapes, models | more, MOST)
        problems += unavailable
    notes = [*(note for note in found.notes if not note.startswith(LOOKS_LIKE)), *problems]
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


def _models_of_large_libraries(shapes: Shapes, steps: Steps) -> tuple[dict[str, Shapes], list[str]]:
    """The tensors of those models that a checkpoint may belong to, of libraries that have too many to build them all.

    A library's models are built in groups, and no further one where a model of a group fits. The second value says what
    could not be compared.
    """
    found: dict[str, Shapes] = {}
    problems: list[str] = []
    for provider in providers.everything().providers:
        if not (provider.has_many_models and provider.is_installed):
            continue
        kept = {} if blueprint_cache.is_off() else _kept(provider.prefix)
        for group in provider.names_like(shapes):
            names = [f"{provider.prefix}:{name}" for name in group]
            built, failed = _built([name for name in names if name not in kept], steps)
            problems += failed.values()
            if built and not blueprint_cache.is_off():
                kept |= built
                _keep(provider.prefix, kept, complete=False)
            known = kept | built
            found |= {name: known[name] for name in names if name in known}
            if _is_found(state_dict_match.best(shapes, found, MOST)):
                break
    return found, problems


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
    found, unavailable = _prefixes()
    problems = list(unavailable)
    kept = {prefix: {} if blueprint_cache.is_off() else _kept(prefix) for prefix in found}
    missing: dict[str | None, list[str]] = {}
    for prefix in found:
        if blueprint_cache.is_off() or not _is_complete(prefix):
            try:
                missing[prefix] = [name for name in _names(prefix) if name not in kept[prefix]]
            except SystemFailureError as error:
                problems.append(error.message)
    built, failed = _built([name for names in missing.values() for name in names], steps)
    for name, shapes in built.items():
        kept[providers.prefix_of(name)][name] = shapes
    for prefix in missing if not blueprint_cache.is_off() else ():
        _keep(prefix, kept[prefix], complete=not any(name in failed for name in missing[prefix]))
    return {name: shapes for models in kept.values() for name, shapes in models.items()}, [*problems, *failed.values()]


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
def _built(names: Sequence[str], steps: Steps) -> tuple[dict[str, Shapes], dict[str, str]]:
    """Return the tensors of models, also built with the arguments that published weights may have been made with.

    The second value has the errors of models of other packages that cannot be built, by name.
    """
    made: dict[str, Shapes] = {}
    failed: dict[str, str] = {}
    for name in steps(names) if names else ():
        try:
            made |= {text: _shapes(text) for text in _variants(name)}
        except ModelcliError as error:
            if providers.prefix_of(name) is None:
                raise
            failed[name] = f"{name} was not compared: {error.message}"
    return made, failed


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
