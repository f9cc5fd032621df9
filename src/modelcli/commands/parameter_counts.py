"""The numbers of parameters of models whose library does not publish them: counted on the meta device, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from modelcli import providers
from modelcli.commands import blueprint_cache
from modelcli.commands.look import stdout_is_for_data
from modelcli.language.references import Source
from modelcli.providers.published import PublishedModel

#: So many models are built for one list at most. Each takes a quarter of a second.
MOST = 100
#: The name of the cache's entry.
_INDEX = "numbers of parameters"


def with_counts(models: Sequence[PublishedModel]) -> tuple[list[PublishedModel], list[str]]:
    """Add the numbers of parameters to those models of large libraries that lack them.

    Args:
        models: each named by the reference that builds it.

    Returns:
        The models in their order, and notes. Where more than `MOST` would have to be built none is, and a note says so.
    """
    lacking = [model.name for model in models if model.params is None and _is_counted(model.name)]
    prefixes = dict.fromkeys(prefix for name in lacking if (prefix := providers.prefix_of(name)) is not None)
    known = {name: count for prefix in prefixes for name, count in _kept(prefix).items()}
    missing = [name for name in lacking if name not in known]
    if len(missing) > MOST:
        found = [replace(model, params=known.get(model.name, model.params)) for model in models]
        return found, [
            f"the parameters of {len(missing)} models are not counted yet: give a pattern for at most {MOST} models"
        ]
    known |= {name: _count(name) for name in missing}
    for prefix in prefixes if missing and not blueprint_cache.is_off() else ():
        counts = {name: count for name, count in known.items() if providers.prefix_of(name) == prefix}
        blueprint_cache.put_index(_INDEX, counts, prefix)
    return [replace(model, params=known.get(model.name, model.params)) for model in models], []


def _is_counted(reference: str) -> bool:
    prefix = providers.prefix_of(reference)
    provider = None if prefix is None else providers.by_prefix(prefix)
    return provider is not None and provider.has_many_models


def _kept(prefix: str) -> dict[str, int]:
    kept = None if blueprint_cache.is_off() else blueprint_cache.index(_INDEX, prefix)
    return {str(name): int(count) for name, count in kept.items()} if isinstance(kept, dict) else {}


@stdout_is_for_data
def _count(reference: str) -> int:
    from modelcli.live import opening

    return opening.open_live(Source(reference)).describe().totals.params
