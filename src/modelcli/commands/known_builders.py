"""The fingerprints of builders that are kept: a look at a file needs nothing more to say which of them it fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelcli import providers
from modelcli.commands import blueprint_cache
from modelcli.errors import SystemFailureError
from modelcli.model import state_dict_match
from modelcli.model.state_dict_match import FINGERPRINTS, Shapes

if TYPE_CHECKING:
    from modelcli.checkpoints import Contents


def add(models: Mapping[str, Shapes]) -> None:
    """Keep the fingerprints of these models too, each by the reference that builds it."""
    kept = _kept()
    most, by_fingerprint, versions = kept["most"], {}, dict(kept["versions"])
    for text, names in kept["models"].items():
        by_fingerprint[text] = {name for name in names if _is_current(name, kept["versions"])}
    for model, shapes in models.items():
        by_fingerprint.setdefault(state_dict_match.fingerprint(shapes), set()).add(model)
        if (prefix := providers.prefix_of(model)) is not None:
            versions[prefix] = providers.versions_of(prefix)
    values = {
        "most": max([most, *map(len, models.values())]),
        "models": {text: state_dict_match.in_order(names) for text, names in by_fingerprint.items() if names},
        "versions": versions,
    }
    blueprint_cache.put_index(FINGERPRINTS, values)


def fitting(contents: Contents) -> list[str]:
    """The models that a file fits exactly, by the references that build them; no provider is asked but for these."""
    kept = _kept()
    if len(contents.tensors) > 2 * kept["most"]:  # what is larger need not be looked at
        return []
    shapes, _ = state_dict_match.unwrapped(state_dict_match.shapes_of(contents.infos().values()))
    names: list[str] = kept["models"].get(state_dict_match.fingerprint(shapes), [])
    return [name for name in names if _is_current(name, kept["versions"])]


def _is_current(model: str, versions: Mapping[str, Any]) -> bool:
    """Whether the libraries of a model's provider are those that it was built with."""
    prefix = providers.prefix_of(model)
    try:
        return prefix is None or versions.get(prefix) == providers.versions_of(prefix)
    except SystemFailureError:  # a provider that can no longer be loaded
        return False


def _kept() -> dict[str, Any]:
    """What is kept: the most tensors that a model of it has, its models by their fingerprints, and the versions of the
    libraries of those that have a prefix."""
    kept = blueprint_cache.index(FINGERPRINTS)
    empty: dict[str, Any] = {"most": 0, "models": {}, "versions": {}}
    return empty | kept if isinstance(kept, dict) else empty
