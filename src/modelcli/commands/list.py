"""The builders that a model reference may name."""

from __future__ import annotations

from dataclasses import dataclass

from modelcli.errors import RequestError


@dataclass(frozen=True)
class ListRequest:
    """Which builders: those whose name contains `pattern`, or matches it where it has a wildcard; None means all."""

    pattern: str | None = None


@dataclass(frozen=True)
class Builder:
    """A builder, with what its library publishes of its default weights: parameters and multiply-accumulates."""

    name: str
    params: int | None
    macs: int | None
    weights: tuple[str, ...]
    group: str


def builders(request: ListRequest) -> tuple[Builder, ...]:
    """The builders that match. Raises RequestError where none does."""
    import fnmatch

    from modelcli.live import zoo

    names, pattern = zoo.builder_names(), request.pattern
    if pattern:
        glob = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
        chosen = [name for name in names if fnmatch.fnmatchcase(name, glob)]
        if not chosen:
            near = zoo.nearest_names(pattern)
            raise RequestError(f"no builder matches {pattern!r}", f"nearest: {', '.join(near)}" if near else None)
        names = chosen
    found = map(zoo.describe, names)
    return tuple(Builder(info.name, info.params, info.macs, info.weights, info.group) for info in found)
