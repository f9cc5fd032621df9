"""Rows that say the same of numbered siblings, shown as one: `layers.[0-11].attn.weight`.

`runs` folds the modules of a model; this folds whatever else has a path: changes of an edit, differences of two models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: A number at the end of a component, or what several were folded to.
_NUMBER = re.compile(r"(?<!\d)(0|[1-9][0-9]{0,8}|\[\d+-\d+\])(?=\.|$)", re.ASCII)


@dataclass(frozen=True)
class Fold:
    """One row that stands for `rows`; `path` is a selector that picks the paths of all of them and no other."""

    path: str
    rows: tuple[Mapping[str, Any], ...]


def folded(rows: Iterable[Mapping[str, Any]], key: str, looks: Callable[[Mapping[str, Any]], Hashable]) -> list[Fold]:
    """Fold rows that look the same and whose paths differ by one number that counts on, again for each number in them.

    Args:
        rows: the rows, in the order in which they are shown.
        key: the key of a row's path.
        looks: what a row shows besides its path.

    Returns:
        The folds, each where its first row was.
    """
    groups: dict[Hashable, dict[str, list[Mapping[str, Any]]]] = {}
    order: dict[tuple[Hashable, str], int] = {}
    for position, row in enumerate(rows):
        group = groups.setdefault(looks(row), {})
        path = str(row[key])
        group.setdefault(path, []).append(row)
        order.setdefault((looks(row), path), position)
    found: list[tuple[int, Fold]] = []
    for look, group in groups.items():
        for path, members in _merged(group).items():
            position = min(order[look, str(row[key])] for row in members)
            found.append((position, Fold(path, tuple(members))))
    return [fold for _, fold in sorted(found, key=lambda item: item[0])]


def _merged(group: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of one look by folded paths: the last number of the paths is folded first, then those before it."""
    merged = {path: list(members) for path, members in group.items()}
    depth = max((len(_NUMBER.findall(path)) for path in merged), default=0)
    for place in range(1, depth + 1):
        by_rest: dict[tuple[str, str], list[tuple[int, str]]] = {}
        single: dict[str, list[Mapping[str, Any]]] = {}
        for path in merged:
            places = list(_NUMBER.finditer(path))
            if len(places) < place or not places[-place][1].isdigit():
                single.setdefault(path, []).extend(merged[path])
                continue
            number = places[-place]
            by_rest.setdefault((path[: number.start()], path[number.end() :]), []).append((int(number[1]), path))
        for (before, after), numbered in by_rest.items():
            for run in _runs(sorted(numbered)):
                first, last = run[0][0], run[-1][0]
                name = f"[{first}-{last}]" if len(run) > 1 else str(first)
                members = single.setdefault(f"{before}{name}{after}", [])
                members += [row for _, path in run for row in merged[path]]
        merged = single
    return merged


def _runs(numbered: Sequence[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Numbers that follow on one another, together."""
    runs: list[list[tuple[int, str]]] = []
    for entry in numbered:
        if runs and entry[0] == runs[-1][-1][0] + 1:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs
