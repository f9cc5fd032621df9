"""What a library publishes of its models: for `list`, and to name their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedModel:
    """What a library says of one of its models. None is what it does not say.

    `params` and `macs` (multiply-accumulates) are those of its default weights, which come first in `weights`.
    `input_size` is the shape of an input without the batch.
    """

    name: str
    group: str | None = None
    weights: tuple[str, ...] = ()
    params: int | None = None
    macs: int | None = None
    input_size: tuple[int, ...] | None = None


def to_json(models: Iterable[PublishedModel]) -> list[dict[str, Any]]:
    """The models as JSON values, for a cache."""
    return [asdict(model) for model in models]


def from_json(values: Any) -> list[PublishedModel]:
    """The models that `to_json` gave. Raises TypeError, KeyError or AttributeError for values that are none."""
    return [_from_json(model) for model in values]


def _from_json(model: dict[str, Any]) -> PublishedModel:
    size = model["input_size"]
    tuples = {"weights": tuple(model["weights"]), "input_size": None if size is None else tuple(size)}
    return PublishedModel(**{**model, **tuples})
