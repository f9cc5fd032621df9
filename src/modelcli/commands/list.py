"""The models that providers know by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modelcli import providers
from modelcli.errors import RequestError, closest
from modelcli.providers.published import PublishedModel

if TYPE_CHECKING:
    from modelcli.live.providers.base import LiveProvider


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

    from modelcli.live.providers import half_of

    found, pattern = providers.everything(), request.pattern
    known: dict[str, tuple[LiveProvider, str]] = {}
    for half in map(half_of, found.providers):
        known |= {half.reference_to(name): (half, name) for name in half.names()}
    chosen = list(known)
    if pattern:
        glob = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
        chosen = [reference for reference in known if fnmatch.fnmatchcase(reference, glob)]
        if not chosen:
            near = closest(pattern, list(known)) or [name for name in known if pattern.lower() in name][:4]
            raise RequestError(f"no builder matches {pattern!r}", f"nearest: {', '.join(near)}" if near else None)
    models = ((reference, *known[reference]) for reference in chosen)
    published = (replace(half.published(name), name=reference) for reference, half, name in models)
    return ListResult(tuple(published), found.problems)
