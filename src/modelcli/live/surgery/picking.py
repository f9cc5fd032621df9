"""What an edit of tensors picks: grouped into the rows that it is told in."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from modelcli import selectors
from modelcli.blueprints import Blueprint, ancestors, shown
from modelcli.errors import RequestError


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


def require_expected(expected: int | None, groups: Sequence[tuple[str, list[str]]]) -> None:
    """Raise RequestError where `--expect` names another number than that of the groups."""
    if expected is not None and len(groups) != expected:
        listed = ", ".join(shown(path) for path, _ in groups[:5]) + (", ..." if len(groups) > 5 else "")
        raise RequestError(f"{len(groups)} match, not the {expected} expected: {listed}")
