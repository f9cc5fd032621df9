"""The fingerprints of builders that are kept: a look at a file needs nothing more to say which of them it fits."""

from __future__ import annotations

from collections.abc import Mapping

from modelcli import cache, likeness
from modelcli.likeness import FINGERPRINTS, Shapes


def add(models: Mapping[str, Shapes]) -> None:
    """Keep the fingerprints of these models too, each by the reference that builds it."""
    most, by_fingerprint = _kept()
    for model, shapes in models.items():
        by_fingerprint.setdefault(likeness.fingerprint(shapes), set()).add(model)
    values = {
        "most": max([most, *map(len, models.values())]),
        "models": {text: likeness.in_order(names) for text, names in by_fingerprint.items()},
    }
    cache.put_index(FINGERPRINTS, values)


def _kept() -> tuple[int, dict[str, set[str]]]:
    """The most tensors that a model of the index has, and its models by their fingerprints."""
    kept = cache.index(FINGERPRINTS)
    if not isinstance(kept, dict):
        return 0, {}
    return kept["most"], {text: set(names) for text, names in kept["models"].items()}
