"""What an edit of tensors picks: grouped into the rows that it is told in."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import ancestors


def groups_of(targets: Sequence[str], blueprint: Blueprint, chosen: Collection[str]) -> list[tuple[str, list[str]]]:
    """The chosen tensors by the outermost module or tensor that a target names: one row each."""
    tops: dict[str, list[str]] = {}
    named: set[str] = set()
    for target in targets:
        selector = selectors.parse(target)
        named |= selectors.matched_modules(selector, blueprint)
    for name in blueprint.by_name:
        if name in chosen:
            holders = [path for path in list(ancestors(name))[1:] if path in named]
            tops.setdefault(holders[-1] if holders else name, []).append(name)
    return list(tops.items())
