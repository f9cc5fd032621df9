"""Find the model that a command works on, and the edits of its recipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcli import providers, ranks, resolve
from modelcli.errors import ModelcliError
from modelcli.language.references import CheckpointFile, PythonObject, Reference, Source
from modelcli.model.paths import ROOT
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.edits import Edit

INPUT = frozenset({"input_size", "input_dtype", "inputs"})
"""The options that state the model's input."""


@dataclass(frozen=True)
class Target:
    """The model that a command works on.

    Attributes:
        source: the reference, and the options that determine the model.
        edits: the edits of the recipe.
        recipe: the recipe; None if the command names a model.
        locations: where those edits are written: `modelcli.toml:5`.
        notes: notes on how the model was chosen.
        restates_input: whether the command's options state another input than the recipe.
    """

    source: Source
    edits: tuple[Edit, ...] = ()
    recipe: Path | None = None
    locations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    restates_input: bool = False

    @contextlib.contextmanager
    def notes_in_errors(self) -> Iterator[None]:
        """Add the notes to an error, because the wrong model may have been chosen."""
        try:
            yield
        except ModelcliError as error:
            error.notes = tuple(dict.fromkeys((*self.notes, *error.notes)))
            raise


def options_given(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given: neither None, nor empty, nor False. A number may be 0."""
    return {key: value for key, value in overrides.items() if value not in (None, (), []) and value is not False}


def with_options(source: Source, given: Mapping[str, Any]) -> Source:
    """Return a source with the given options. Given inputs replace all inputs that a recipe states."""
    if "input_size" in given or "inputs" in given:
        source = replace(source, input_size=None, inputs=())
    return replace(source, **given)


def find_target(
    model: str | None,
    overrides: Mapping[str, Any],
    recipe_path: Path | None = None,
) -> Target:
    """Return the model of the argument or `-m`, else of `$MODELCLI_MODEL`, else of the working recipe.

    Options of the command take precedence over the recipe's lines.
    """
    given = options_given(overrides)
    if model:
        return Target(Source(model=model, **given))
    from modelcli import recipe

    path = recipe_path or recipe.default_path()
    if named := os.environ.get("MODELCLI_MODEL"):
        note = f"$MODELCLI_MODEL is {named} and takes precedence over {path}: unset it to work on the recipe"
        return Target(Source(model=named, **given), notes=(note,) if path.exists() else ())
    read = recipe.read(path)
    source = with_options(read.source, given)
    edits = edits_seen_from(read.edits, path.parent, Path())
    return Target(
        source,
        edits,
        read.path,
        read.locations,
        notes=(*notes_of_python(path, read.source, edits), *_ignored_by_recipe(path, read.source, given)),
        restates_input=any(getattr(source, key) != getattr(read.source, key) for key in INPUT),
    )


def _ignored_by_recipe(path: Path, source: Source, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note on options that contradict the recipe; they apply to this command and do not change the recipe."""
    other = [
        f"--{key}" for key in ("weights", "arch", "key", "seed") if key in given and getattr(source, key) != given[key]
    ]
    if not other:
        return ()
    verb = "applies" if len(other) == 1 else "apply"
    return (f"{listed(other, 4)} {verb} to this command only: {path} has another value, and is unchanged",)


def notes_of_python(path: Path, source: Source, edits: Sequence[Edit], *, own: bool = False) -> tuple[str, ...]:
    """Return a note the first time that a recipe names Python code, which runs like that of a Makefile.

    modelcli remembers the path of the recipe and the code that it names. With `own`, the user has just written the
    recipe and needs no note.
    """
    from modelcli.language.expressions import names_in
    from modelcli.providers import known_code

    references = [*_references_of(source), *_references_in(edits)]
    named = {str(reference) for reference in references if isinstance(reference, PythonObject)}
    of_edits = (name for edit in edits for call in edit.modules() for name in names_in(call))
    named |= {name for name in of_edits if not known_code.is_known_name(name)}
    if not named:
        return ()
    from modelcli.commands import blueprint_cache

    name = f"Python of {os.path.realpath(path)}"
    known = blueprint_cache.index(name)
    if isinstance(known, list) and named <= set(known):
        return ()
    if not blueprint_cache.is_off():
        blueprint_cache.put_index(name, sorted(named))
    if own:
        return ()
    return (f"{path} names Python code, which runs with your rights, as a Makefile does: {listed(sorted(named), 4)}",)


def _references_of(source: Source) -> Iterator[Reference]:
    for text in (source.model, source.arch):
        with contextlib.suppress(ModelcliError):
            if text is not None:
                yield resolve.parse(text, source.folder)


def _references_in(edits: Sequence[Edit]) -> Iterator[Reference]:
    """Yield what edits name whose paths are relative to the current folder."""
    for text in (text for edit in edits for text in edit.references()):
        from modelcli import model_parts

        with contextlib.suppress(ModelcliError):
            yield resolve.parse(model_parts.split(text)[0])


@contextlib.contextmanager
def recipe_locked(
    model: str | None, recipe_path: Path | None = None, waiting: Callable[[Path], None] = lambda _: None
) -> Iterator[None]:
    """Keep other commands from changing the working recipe while a command works on it.

    `waiting` is called with its path if another command is using it.
    """
    if model or os.environ.get("MODELCLI_MODEL") or ranks.current().rank:  # rank 0 changes the recipe
        yield
        return
    from modelcli import recipe

    path = recipe_path or recipe.default_path()
    with recipe.locked(path, lambda: waiting(path)):
        yield


def names_model(word: str) -> bool:
    """Whether a word names a builder or an existing checkpoint. `.` does not: in an edit it is the model's root."""
    if word == ROOT:
        return False
    try:
        reference = resolve.parse(word)
        if isinstance(reference, CheckpointFile):
            return True
        return any(word in provider.names() for provider in providers.built_in())
    except ModelcliError:  # this is only for a hint, so no error
        return False


def seen_from(source: Source, folder: Path) -> Source:
    """Return a source with its relative paths changed to be relative to another folder."""
    from modelcli import model_parts

    def moved(text: str | None) -> str | None:
        return None if text is None else model_parts.reference_seen_from(text, source.folder, folder)

    model = moved(source.model)
    assert model is not None
    weights = source.weights
    if weights is not None and Path(source.folder / weights).is_file():
        weights = moved(weights)
    return replace(source, model=model, arch=moved(source.arch), weights=weights, folder=folder)


def edits_seen_from(edits: Sequence[Edit], base: Path, folder: Path) -> tuple[Edit, ...]:
    """Return edits, whose relative paths start at `base`, with their paths as seen from another folder."""

    def seen(text: str) -> str:
        from modelcli import model_parts  # most edits have no paths

        return model_parts.seen_from(text, base, folder)

    return tuple(edit.with_paths(seen) for edit in edits)


def without_edits(target: Target) -> Target:
    return replace(target, edits=(), locations=())
