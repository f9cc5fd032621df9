"""Counts and lists of names, worded for use in a sentence."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str, several: str | None = None) -> str:
    """Return `1 tensor` or `5,000 tensors`. `several` is the plural if it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else several or f'{noun}s'}"


def listed(names: Sequence[str], most: int) -> str:
    """Return the first `most` names and the number of the others: `a, b and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def brief_repr(value: object) -> str:
    """Return the start of the `repr` of a number or text, and only the type of any other value.

    A small file can describe a value whose `repr` would take very long.
    """
    return f"{value!r:.40}" if isinstance(value, bool | int | float | str | None) else f"a {type(value).__name__}"


def is_or_are(number: int) -> str:
    """Return the verb for this number of things."""
    return "is" if number == 1 else "are"
