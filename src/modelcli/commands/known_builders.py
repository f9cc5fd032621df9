"""The fingerprints of builders that are kept: a look at a file needs nothing more to say which of them it fits."""

from __future__ import annotations

from collections.abc import Mapping

from modelcli.commands import blueprint_cache
from modelcli.model import state_dict_match
from modelcli.model.state_dict_match import FINGERPRINTS, Shapes


def add(models: Mapping[str, Shapes]) -> None:
    """Keep the fingerprints of these models too, each by the reference that builds it."""
    most, by_fingerprint = _kept()
    for model, shapes in models.items():
        by_fingerprint.setdefault(state_dict_match.fingerprint(shapes), set()).add(model)
    values = {
        "most": max([most, *map(len, models.values())]),
        "models": {text: state_dict_match.in_order(names) for text, names in by_fingerprint.items()},
    }
    blueprint_cache.put_index(FINGERPRINTS, values)


def _kept() -> tuple[int, dict[str, set[str]]]:
    """The most tensors that a model of the index has, and its models by their fingerprints."""
    kept = blueprint_cache.index(FINGERPRINTS)
    if not isinstance(kept, dict):
        return 0, {}
    return kept["most"], {text: set(names) for text, names in kept["models"].items()}
