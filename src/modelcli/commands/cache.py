"""The cache of blueprints: find it, fill it, clear it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelcli.commands import blueprint_cache
from modelcli.errors import RequestError

#: Iterates over names, each of which takes a while, and may show the progress.
Steps = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class WarmRequest:
    """The models whose blueprints to cache: those whose reference contains `pattern` or matches it; None means all."""

    pattern: str | None = None


@dataclass(frozen=True)
class CacheState:
    """The folder of the cache, how many blueprints are in it, and how many bytes they take."""

    folder: Path
    entries: int
    nbytes: int


def state() -> CacheState:
    """Return the state of the cache. Raises SystemFailureError if there is no folder for it."""
    where, entries = blueprint_cache.folder(), blueprint_cache.entries()
    return CacheState(where, len(entries), sum(entry.stat().st_size for entry in entries if entry.exists()))


def clear() -> int:
    """Remove every blueprint, and return how many there were."""
    return blueprint_cache.clear()


def warm(request: WarmRequest, steps: Steps = iter) -> None:
    """Cache the blueprints of builders, so that showing them needs no torch.

    Raises RequestError if no builder matches or caching is off, SystemFailureError if the cache cannot be written.
    """
    from modelcli.commands import identify
    from modelcli.commands.list import ListRequest, named_models

    names = [model.name for model in named_models(ListRequest(request.pattern)).models]
    for name in steps(names):
        _keep(name)
    identify.keep(names, complete=request.pattern is None)


def _keep(name: str) -> None:
    """Cache the blueprint of a builder, if it is not cached yet."""
    from modelcli.commands.look import LookRequest, cache_key, look
    from modelcli.commands.target import Target
    from modelcli.language.references import Source

    if blueprint_cache.is_off():
        raise RequestError("$MODELCLI_NO_CACHE is set, so no blueprint would be cached", "unset MODELCLI_NO_CACHE")
    target = Target(Source(model=name))
    found = look(LookRequest(target, traced=True))
    if (key := cache_key(target, "eval")) is not None:
        blueprint_cache.require(key, found.blueprint)
