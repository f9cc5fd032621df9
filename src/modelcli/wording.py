"""Counts of things and lists of names, as a sentence has them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str, several: str | None = None) -> str:
    """`1 tensor`, `5,000 tensors`; `several` is the plural where it is no more than an s."""
    return f"{number:,} {noun if number == 1 else several or f'{noun}s'}"


def listed(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are: `a, b and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_or_are(number: int) -> str:
    """The verb for so many things."""
    return "is" if number == 1 else "are"
