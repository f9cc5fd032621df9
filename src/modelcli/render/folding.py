"""Fold rows of numbered siblings that look the same into one row: `layers.[0-11].attn.weight`.

This module defines what counts as a number in a path and how a range of numbers is written. `fold_rows` compares single
rows: the changes of an edit, the differences of two models. `runs` folds the modules of a model, which must have equal
subtrees as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_DIGITS = r"0|[1-9][0-9]{0,8}"
#: A number at the end of a path component, or the range that several numbers were folded to.
_NUMBER = re.compile(rf"(?<!\d)({_DIGITS}|\[\d+-\d+\])(?=\.|$)", re.ASCII)
#: A name that ends in a number.
_NUMBERED = re.compile(rf"(.*?)({_DIGITS})", re.ASCII | re.DOTALL)


def counts_on(name: str, following: str) -> bool:
    """Whether two names end in consecutive numbers and are equal in front of them: `layer_1` and `layer_2`."""
    first, second = _NUMBERED.fullmatch(name), _NUMBERED.fullmatch(following)
    return first is not None and second is not None and first[1] == second[1] and int(first[2]) + 1 == int(second[2])


def numbered(name: str) -> tuple[str, int]:
    """Return what is in front of the number at the end of a name, and the number: `("layer_", 1)`."""
    found = _NUMBERED.fullmatch(name)
    assert found is not None
    return found[1], int(found[2])


def range_of(names: Sequence[str]) -> str:
    """Return a selector for names with consecutive numbers: `layer_[1-4]`. A single name is returned as it is."""
    first, last = _NUMBERED.fullmatch(names[0]), _NUMBERED.fullmatch(names[-1])
    return names[0] if len(names) == 1 or first is None or last is None else f"{first[1]}[{first[2]}-{last[2]}]"


@dataclass(frozen=True)
class Fold:
    """One row that stands for `rows`. `path` is a selector that picks exactly their paths."""

    path: str
    rows: tuple[Mapping[str, Any], ...]


def fold_rows(
    rows: Iterable[Mapping[str, Any]], key: str, looks: Callable[[Mapping[str, Any]], Hashable]
) -> list[Fold]:
    """Fold rows that look the same and whose paths differ only in one number, where these numbers are consecutive.

    The paths of the folds are folded again in the same way, for each number that a path contains.

    Args:
        rows: the rows, in the order in which they are shown.
        key: the key of a row's path.
        looks: returns what a row shows besides its path.

    Returns:
        The folds, each at the position of its first row.
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
    """Fold the paths of rows that look the same: first by the last number in each path, then by those before it."""
    merged = {path: list(members) for path, members in group.items()}
    depth = max((len(_NUMBER.findall(path)) for path in merged), default=0)
    for position in range(1, depth + 1):  # from the end of the path
        by_rest: dict[tuple[str, str], list[tuple[int, str]]] = {}
        single: dict[str, list[Mapping[str, Any]]] = {}
        for path in merged:
            numbers = list(_NUMBER.finditer(path))
            if len(numbers) < position or not numbers[-position][1].isdigit():
                single.setdefault(path, []).extend(merged[path])
                continue
            number = numbers[-position]
            by_rest.setdefault((path[: number.start()], path[number.end() :]), []).append((int(number[1]), path))
        for (before, after), numbered in by_rest.items():
            for run in _runs(sorted(numbered)):
                name = range_of([str(number) for number, _ in run])
                members = single.setdefault(f"{before}{name}{after}", [])
                members += [row for _, path in run for row in merged[path]]
        merged = single
    return merged


def _runs(numbered: Sequence[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Group consecutive numbers."""
    runs: list[list[tuple[int, str]]] = []
    for entry in numbered:
        if runs and entry[0] == runs[-1][-1][0] + 1:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs
