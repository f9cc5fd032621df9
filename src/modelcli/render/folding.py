"""Numbered siblings that look the same, shown as one row: `layers.[0-11].attn.weight`.

This says what a number in a path is and how a span of numbers is written. `folded` folds rows by their paths alone:
changes of an edit, differences of two models. `runs` folds the modules of a model, whose subtrees have to be alike too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_DIGITS = r"0|[1-9][0-9]{0,8}"
#: A number at the end of a component, or what several were folded to.
_NUMBER = re.compile(rf"(?<!\d)({_DIGITS}|\[\d+-\d+\])(?=\.|$)", re.ASCII)
#: A name that ends in a number.
_NUMBERED = re.compile(rf"(.*?)({_DIGITS})", re.ASCII | re.DOTALL)


def counts_on(name: str, following: str) -> bool:
    """Whether two names end in a number, the second in the next one: `layer_1` and `layer_2`."""
    one, other = _NUMBERED.fullmatch(name), _NUMBERED.fullmatch(following)
    return one is not None and other is not None and one[1] == other[1] and int(one[2]) + 1 == int(other[2])


def span(names: Sequence[str]) -> str:
    """One name for names that count on: `layer_[1-4]`, which selects all of them."""
    first, last = _NUMBERED.fullmatch(names[0]), _NUMBERED.fullmatch(names[-1])
    return names[0] if len(names) == 1 or first is None or last is None else f"{first[1]}[{first[2]}-{last[2]}]"


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
    """Rows that look the same, by folded paths: the last number of the paths is folded first, then those before it."""
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
                name = span([str(number) for number, _ in run])
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
