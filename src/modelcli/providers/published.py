"""What a library publishes of its models: for `list`, and to name their weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedModel:
    """What a library says of one of its models. None is what it does not say.

    `params` and `macs` (multiply-accumulates) are those of its default weights, which come first in `weights`.
    """

    name: str
    group: str | None = None
    weights: tuple[str, ...] = ()
    params: int | None = None
    macs: int | None = None
