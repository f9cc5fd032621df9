"""Words of commands that are shown for somebody to copy: quoted for whichever shell they are pasted into."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable


def quoted(word: object) -> str:
    """A word that bash, zsh and fish all take as this text, as it is where it means nothing to any of them.

    Names of tensors, files and classes come from files: `$(...)` among them must not run when a hint is copied. What
    `shlex.quote` makes of a backslash and a single quote is something else in fish, which knows backslashes inside of
    single quotes.
    """
    text = str(word)
    if not text.startswith("=") and shlex.quote(text) == text:
        return text
    if "'" in text and not re.search(r'["\\$`!]', text):
        return f'"{text}"'
    parts = re.split(r"([\\']+)", text)
    return "".join(_part(part) for part in parts if part)


def _part(part: str) -> str:
    """A part of a word: one of backslashes and single quotes, or one without any."""
    if part[0] not in "\\'":
        return f"'{part}'"
    return "".join("\\\\" if character == "\\" else '"\'"' for character in part)


def command(words: Iterable[object]) -> str:
    """A whole command line of these words."""
    return " ".join(map(quoted, words))
