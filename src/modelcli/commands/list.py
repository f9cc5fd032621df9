"""The models that providers know by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from modelcli import providers
from modelcli.errors import RequestError, SystemFailureError, closest
from modelcli.providers.published import PublishedModel


@dataclass(frozen=True)
class ListRequest:
    """Which models: those whose reference contains `pattern`, or matches it where it has a wildcard; None means all."""

    pattern: str | None = None


@dataclass(frozen=True)
class ListResult:
    """Models, each named by the reference that builds it. `notes` say which providers could not be asked."""

    models: tuple[PublishedModel, ...]
    notes: tuple[str, ...] = ()


def named_models(request: ListRequest) -> ListResult:
    """The models that match, as their libraries publish them. Raises RequestError where none does."""
    import fnmatch

    pattern = request.pattern
    known, notes = _known(pattern or "")
    chosen = list(known)
    if pattern:
        glob = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
        chosen = [reference for reference in known if fnmatch.fnmatchcase(reference, glob)]
        if not chosen:
            near = closest(pattern, list(known)) or [name for name in known if pattern.lower() in name][:4]
            raise RequestError(f"no builder matches {pattern!r}", f"nearest: {', '.join(near)}" if near else None)
    return ListResult(tuple(replace(known[reference](), name=reference) for reference in chosen), tuple(notes))


def _known(pattern: str) -> tuple[dict[str, Callable[[], PublishedModel]], list[str]]:
    """What tells of each model, by the reference to it, and what is wrong with providers that cannot say.

    Of a pattern with the prefix of a provider that provider alone is asked.
    """
    from modelcli.live.providers import blamed, half_of

    prefix = providers.prefix_of(pattern)
    named = None if prefix is None else providers.by_prefix(prefix)
    asked, problems = ((named,), ()) if named is not None else providers.everything()
    known: dict[str, Callable[[], PublishedModel]] = {}
    notes = list(problems)
    for provider in asked:
        try:
            with blamed(provider):
                half = half_of(provider)
                known |= {half.reference_to(name): functools.partial(half.published, name) for name in half.names()}
        except SystemFailureError as error:
            notes.append(error.message)
    return known, notes
