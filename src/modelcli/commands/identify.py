"""Which torchvision builder a checkpoint belongs to, by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from modelcli import resolve
from modelcli.commands import blueprint_cache, known_builders
from modelcli.commands.look import LOOKS_LIKE, Look, LookRequest, cache_key, look, stdout_is_for_data
from modelcli.commands.target import Target
from modelcli.errors import RequestError
from modelcli.language.quoting import quoted
from modelcli.language.references import CheckpointFile, Source
from modelcli.model import state_dict_match
from modelcli.model.state_dict_match import LISTING, Match, Shapes
from modelcli.model.tensors import Shape

#: Models that are shown where none fits exactly.
MOST = 3

#: Goes through names that each take a while, and may show how far it has come.
Steps = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class IdentifyRequest:
    """A checkpoint, and the key of the state dict in it where it holds several."""

    checkpoint: str
    key: str | None = None


@dataclass(frozen=True)
class IdentifyResult:
    """The models that a checkpoint fits exactly, or those that come near, the nearest first; none may be."""

    look: Look
    matches: tuple[Match, ...]
    notes: tuple[str, ...] = ()


def identify(request: IdentifyRequest, steps: Steps = iter) -> IdentifyResult:
    """Compare a checkpoint with every builder of torchvision; what is not in the cache is built, on the meta device.

    Prefixes of wrappers are stripped. Raises RequestError for what is no checkpoint.
    """
    checkpoint = request.checkpoint
    source = Source(checkpoint, key=request.key)
    if not isinstance(resolve.reference_of(source), CheckpointFile):
        raise RequestError(f"{checkpoint} is no checkpoint: it says itself which model it is", "name a file: best.pth")
    found = look(LookRequest(Target(source)))
    shapes, unwrapping = state_dict_match.unwrapped(state_dict_match.shapes_of(found.blueprint.tensors))
    matches = state_dict_match.best(shapes, _models(steps), MOST)
    notes = [note for note in found.notes if not note.startswith(LOOKS_LIKE)]
    if unwrapping:
        notes.append(unwrapping.note())
    if matches:
        first = matches[0]
        words = f"--arch {quoted(first.model)}"
        if first.exact:
            notes.append(f"{words} is its architecture: modelcli load {quoted(checkpoint)} {words}")
        elif (fitting := _with_classes(first, shapes)) is not None:
            notes.append(f"{fitting} fits exactly: modelcli load {quoted(checkpoint)} --arch {quoted(fitting)}")
    return IdentifyResult(found, tuple(matches), tuple(notes))


def keep(names: Sequence[str], *, complete: bool) -> None:
    """Keep the names and shapes of these builders, and their fingerprints; `complete` says that there are no others."""
    listed = _kept()
    _keep(listed | _built([name for name in names if name not in listed], iter), complete=complete)


def _models(steps: Steps) -> dict[str, Shapes]:
    """The tensors of every builder, by the reference that builds it."""
    kept = blueprint_cache.index(LISTING)
    if isinstance(kept, dict) and kept["complete"] and not blueprint_cache.is_off():
        return _kept()
    from modelcli.live import zoo

    listed = {} if blueprint_cache.is_off() else _kept()
    missing = [name for name in zoo.builder_names() if name not in listed]
    listed |= _built(missing, steps)
    if not blueprint_cache.is_off():
        _keep(listed, complete=True)
    return listed


def _kept() -> dict[str, Shapes]:
    kept = blueprint_cache.index(LISTING)
    if not isinstance(kept, dict):
        return {}
    return {model: {name: tuple(shape) for name, shape in shapes.items()} for model, shapes in kept["models"].items()}


def _keep(models: dict[str, Shapes], *, complete: bool) -> None:
    before = blueprint_cache.index(LISTING)
    complete = complete or (isinstance(before, dict) and before["complete"])
    blueprint_cache.put_index(LISTING, {"complete": complete, "models": models})
    known_builders.add(models)


@stdout_is_for_data
def _built(names: Sequence[str], steps: Steps) -> dict[str, Shapes]:
    """The tensors of builders, with the arguments that published weights may have been made with, too."""
    if not names:
        return {}
    from modelcli.live import zoo

    return {text: _shapes(text) for name in steps(names) for text in zoo.references_of(name)}


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
    """The model with another number of classes, where a replaced head is all that does not fit."""
    counts = {item.found[0] if item.found else None for item in match.mismatched}
    if len(counts) != 1 or None in counts or match.missing or match.unexpected:
        return None
    builder, _, arguments = match.model.removesuffix(")").partition("(")
    text = f"{builder}({f'{arguments}, ' if arguments else ''}num_classes={counts.pop()})"
    try:
        return text if state_dict_match.compare(text, _shapes(text), shapes).exact else None
    except RequestError:
        return None
