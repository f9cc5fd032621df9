"""Names of tensors that differ in a number, in which one pattern has a wildcard more than another."""

from __future__ import annotations

import re
from collections.abc import Sequence

from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.wording import counted


def counting(more: str, fewer: str, example: str) -> tuple[int, str]:
    """Return the place among the wildcards of a pattern, and the text, of the one that another pattern lacks.

    It is a `*` or a range of numbers such as `[0-7]`; of several that it may be, the last.

    Args:
        more: the pattern that has it.
        fewer: the pattern with the others, in the same order.
        example: a line of the edit that asks, for errors.

    Raises:
        RequestError: the patterns are not such a pair.
    """
    with_number, others = selectors.wildcards(more), selectors.wildcards(fewer)
    for place in reversed(range(len(with_number))):
        wildcard = with_number[place]
        if [*with_number[:place], *with_number[place + 1 :]] == others and (wildcard == "*" or wildcard[0] == "["):
            return place, wildcard
    raise RequestError(
        f"{more!r} needs all wildcards of {fewer!r} in the same order, and one more for the number: * or [0-7]", example
    )


def number_of(text: str, name: str, wildcard: str) -> int:
    """Return the number that a wildcard captured. Raises RequestError for another text."""
    if re.fullmatch(r"0|[1-9]\d{0,8}", text, re.ASCII) is None:
        raise RequestError(
            f"{wildcard} stands for {text!r} in {name}, which is no number",
            "the last * counts: write [0-7] for another one that does, or a narrower name",
        )
    return int(text)


def wanted(wildcard: str, count: int) -> list[int] | None:
    """Return the numbers that a wildcard takes for so many tensors; None for a range with another number of them."""
    if wildcard == "*":
        return list(range(count))
    spans = _spans(wildcard)
    if sum(last + 1 - first for first, last in spans) != count:
        return None
    return [number for first, last in spans for number in range(first, last + 1)]


def described(wildcard: str) -> str:
    """Return which numbers a wildcard takes, in words."""
    if wildcard == "*":
        return "all from 0 on"
    return (
        counted(sum(last + 1 - first for first, last in _spans(wildcard)), "number") + ", all of which have to be there"
    )


def told(numbers: Sequence[int]) -> str:
    """Return numbers in short: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more ranges" if len(texts) > 8 else "")


def _spans(wildcard: str) -> list[tuple[int, int]]:
    """Return the ranges in a wildcard such as `[0-3,7]`."""
    found = []
    for piece in wildcard[1:-1].split(","):
        first, _, last = piece.partition("-")
        found.append((int(first), int(last or first)))
    return found
