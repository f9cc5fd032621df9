"""Keep the blueprints of builders on disk before they are asked for."""

from __future__ import annotations

from modelcli.commands import blueprint_cache
from modelcli.commands.look import cache_key, look
from modelcli.commands.target import Target
from modelcli.errors import RequestError
from modelcli.language.references import Source


def warm(name: str) -> None:
    """Keep the blueprint of a builder, if it is not kept yet. Raises RequestError where nothing may be kept, and
    SystemFailureError where nothing can."""
    if blueprint_cache.is_off():
        raise RequestError("$MODELCLI_NO_CACHE is set: no blueprint would be kept", "unset MODELCLI_NO_CACHE")
    target = Target(Source(model=name))
    found = look(target, traced=True)
    if (key := cache_key(target, "eval")) is not None:
        blueprint_cache.require(key, found.blueprint)
