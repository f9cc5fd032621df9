"""The models that providers know by name.

What a provider's library publishes of them is read from the library once, which imports it and torch. It is then kept
for the installed versions of the libraries that the provider declares (`packages`), so that later lists need neither.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace

from modelcli import providers
from modelcli.commands import blueprint_cache, parameter_counts
from modelcli.errors import RequestError, SystemFailureError, closest
from modelcli.language.quoting import quoted
from modelcli.providers import published
from modelcli.providers.base import Provider
from modelcli.providers.published import PublishedModel
from modelcli.wording import counted


@dataclass(frozen=True)
class ListRequest:
    """The models to list: those whose reference contains `pattern` or, with wildcards, matches it; None means all."""

    pattern: str | None = None


@dataclass(frozen=True)
class ListResult:
    """Models, each named by the reference that builds it. `notes` say which providers could not be asked."""

    models: tuple[PublishedModel, ...]
    notes: tuple[str, ...] = ()


def named_models(request: ListRequest) -> ListResult:
    """Return the matching models with their published figures. Raises RequestError if none matches."""
    pattern = request.pattern
    if pattern is not None and (at_hand := _at_hand(pattern)) is not None:
        return at_hand
    known, notes = _known(pattern or "")
    chosen = list(known)
    others = [] if pattern is not None and providers.prefix_of(pattern) is not None else _in_large_libraries(pattern)
    if pattern:
        glob = _glob(pattern)
        chosen = [reference for reference in known if fnmatch.fnmatchcase(reference, glob)]
        if not chosen:
            near = closest(pattern, list(known)) or [name for name in known if pattern.lower() in name][:4]
            hints = [*([f"nearest: {', '.join(near)}"] if near else []), *others, *notes]
            raise RequestError(f"no builder matches {pattern!r}", "; ".join(hints) or None)
    models, uncounted = parameter_counts.with_counts([known[reference] for reference in chosen])
    return ListResult(tuple(models), tuple(dict.fromkeys((*notes, *others, *uncounted))))


def _at_hand(pattern: str) -> ListResult | None:
    """The matching models on this machine, where a pattern has the prefix of a provider without a list of all its own.

    Raises RequestError if none matches.
    """
    prefix = providers.prefix_of(pattern)
    provider = None if prefix is None else providers.by_prefix(prefix)
    if provider is None or provider.has_names or not (found := provider.at_hand())[1]:
        return None
    models, place = found
    named = [replace(model, name=f"{prefix}:{model.name}") for model in models]
    glob = f"{prefix}:{_glob(pattern.partition(':')[2])}"
    chosen = [model for model in named if fnmatch.fnmatchcase(model.name, glob)]
    others = f"a model need not be there: {provider.title}"
    if not chosen:
        near = closest(pattern, [model.name for model in named])
        hints = [f"nearest: {', '.join(near)}"] if near else []
        raise RequestError(
            f"none of {counted(len(named), 'model')} in {place} matches {pattern!r}", "; ".join([*hints, others])
        )
    return ListResult(tuple(chosen), (f"these models are in {place}; {others}",))


def _glob(pattern: str) -> str:
    """The wildcard that a pattern stands for: one without any is looked for anywhere in a name."""
    return pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"


def _in_large_libraries(pattern: str | None) -> list[str]:
    """Where more models match, of libraries that are listed for a pattern with their prefix alone."""
    glob, notes = "*" if pattern is None else _glob(pattern), []
    for provider in providers.everything().providers:
        if provider.has_many_models and provider.is_installed:
            count = len(fnmatch.filter(provider.names(), glob))
            shown = quoted(f"{provider.prefix}:{glob}")
            if count:
                notes.append(f"{counted(count, 'model')} of {provider.name} match too: modelcli list {shown}")
    return notes


def _known(pattern: str) -> tuple[dict[str, PublishedModel], list[str]]:
    """Return all models by their references, and the errors of providers that failed.

    For a pattern with the prefix of a provider, only that provider is asked.
    """
    prefix = providers.prefix_of(pattern)
    named = None if prefix is None else providers.by_prefix(prefix)
    asked, problems = ((named,), ()) if named is not None else providers.everything()
    known: dict[str, PublishedModel] = {}
    notes = list(problems)
    for provider in asked:
        if not provider.has_names or (provider.has_many_models and named is None):
            continue
        try:
            models, failed = _models_of(provider)
            known |= {model.name: model for model in models}
            notes += failed
        except SystemFailureError as error:
            notes.append(error.message)
    return known, notes


def _models_of(provider: Provider) -> tuple[list[PublishedModel], list[str]]:
    """Return the models of a provider, from the cache or from its library, and what is wrong with others of them.

    Each model is named by the reference that builds it. Nothing is kept where any model failed.
    """
    index, is_cached = f"published models of {provider.name}", _may_be_kept(provider)
    if is_cached:
        try:
            return published.from_json(blueprint_cache.index(index, provider.prefix)), []
        except (TypeError, KeyError, AttributeError):
            pass  # nothing is kept, or something that another program wrote
    from modelcli.live.providers import blamed, half_of

    with blamed(provider):
        half = half_of(provider)
        names = list(half.names())
    found, problems = [], []
    for name in names:
        try:
            with blamed(provider):
                found.append(replace(half.published(name), name=half.reference_to(name)))
        except SystemFailureError as error:
            problems.append(error.message)
    if is_cached and not problems:
        blueprint_cache.put_index(index, published.to_json(found), provider.prefix)
    return found, problems


def _may_be_kept(provider: Provider) -> bool:
    """Whether the versions of the provider's libraries say when to ask these again."""
    if blueprint_cache.is_off() or not provider.packages:
        return False
    versions = providers.versions_of(provider.prefix)
    return all(versions[package] is not None for package in provider.packages)
