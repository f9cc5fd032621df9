"""The figures that a library publishes for its models, for `list`, and the names of their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedModel:
    """The figures that a library publishes for a model. None means that it does not publish a figure.

    `params` and `macs` (multiply-accumulates) are those of the default weights, the first of `weights`. `input_size` is
    the shape of an input without the batch dimension.
    """

    name: str
    group: str | None = None
    weights: tuple[str, ...] = ()
    params: int | None = None
    macs: int | None = None
    input_size: tuple[int, ...] | None = None


def to_json(models: Iterable[PublishedModel]) -> list[dict[str, Any]]:
    """Return the models as JSON values, for a cache."""
    return [asdict(model) for model in models]


def from_json(values: Any) -> list[PublishedModel]:
    """Return models from the result of `to_json`. Raises TypeError, KeyError or AttributeError for other values."""
    return [_from_json(model) for model in values]


def _from_json(model: dict[str, Any]) -> PublishedModel:
    size = model["input_size"]
    tuples = {"weights": tuple(model["weights"]), "input_size": None if size is None else tuple(size)}
    return PublishedModel(**{**model, **tuples})
