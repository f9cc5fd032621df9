"""Cached fingerprints of builders, to find the builders that a file fits."""

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
    """Add the fingerprints of these models, each by its reference, to the cache."""
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
    """Return the references of the cached models that a file fits exactly."""
    kept = _kept()
    if len(contents.tensors) > 2 * kept["most"]:  # no cached model is this large
        return []
    shapes, _ = state_dict_match.unwrapped(state_dict_match.shapes_of(contents.infos().values()))
    names: list[str] = kept["models"].get(state_dict_match.fingerprint(shapes), [])
    return [name for name in names if _is_current(name, kept["versions"])]


def _is_current(model: str, versions: Mapping[str, Any]) -> bool:
    """Whether the libraries of a model's provider have the versions that it was built with."""
    prefix = providers.prefix_of(model)
    try:
        return prefix is None or versions.get(prefix) == providers.versions_of(prefix)
    except SystemFailureError:  # a provider that can no longer be loaded
        return False


def _kept() -> dict[str, Any]:
    """The cached data: the largest number of tensors of a model, the models by their fingerprints, and the versions of
    the libraries of models with a prefix."""
    kept = blueprint_cache.index(FINGERPRINTS)
    empty: dict[str, Any] = {"most": 0, "models": {}, "versions": {}}
    return empty | kept if isinstance(kept, dict) else empty
