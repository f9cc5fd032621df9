"""Quote words of commands that a message prints for people to copy into bash, zsh or fish."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable


def quoted(word: object) -> str:
    """Return a spelling of `word` that bash, zsh and fish all read as its text, unquoted if that is safe.

    Names of tensors, files and classes come from files, and `$(...)` in a name must not run when somebody copies a
    hint. `shlex.quote` is not enough: fish interprets backslashes inside single quotes.
    """
    text = str(word)
    if not text.startswith("=") and shlex.quote(text) == text:
        return text
    if "'" in text and not re.search(r'["\\$`!]', text):
        return f'"{text}"'
    parts = re.split(r"([\\']+)", text)
    return "".join(_part(part) for part in parts if part)


def _part(part: str) -> str:
    """Quote a part of a word that consists of backslashes and single quotes alone, or has neither."""
    if part[0] not in "\\'":
        return f"'{part}'"
    return "".join("\\\\" if character == "\\" else '"\'"' for character in part)


def command(words: Iterable[object]) -> str:
    """Return the words as one command line."""
    return " ".join(map(quoted, words))
