"""The words of an edit's line: split them like a POSIX shell, quote them if needed, and recognise options."""

from __future__ import annotations

import re
from collections.abc import Sequence

from modelcli.errors import RequestError, did_you_mean
from modelcli.language.quoting import quoted

#: The parts of a word for a POSIX shell: plain characters, quoted ones, and those after a backslash.
_PIECE = r"""[^ \t\r\n'"\\]+|'[^']*'|"(?:[^"\\]|\\.)*"|\\."""
_PIECES = re.compile(_PIECE, re.DOTALL)
#: It always matches, so it never backtracks. A # where a word could begin starts a comment.
_WORD = re.compile(rf"(?:[ \t\r\n]+|#[^\r\n]*)*((?:{_PIECE})*)", re.DOTALL)

#: A negative number, or numbers with commas and dashes of which the first is negative: `-1,64` and `-3--1`.
_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|-\d[\d,\s-]*", re.ASCII)


def split_words(line: str) -> list[str]:
    """Split a line like a POSIX shell, in linear time. A word that starts with `#` starts a comment.

    Raises RequestError for a quote that is not closed.
    """
    words, position = [], 0
    while match := _WORD.match(line, position):
        position = match.end()
        if not match[1]:
            break
        words.append(_PIECES.sub(lambda piece: _unquoted(piece[0]), match[1]))
    if position < len(line):
        what = "No escaped character" if line[position] == "\\" else "No closing quotation"
        raise RequestError(f"cannot split {line!r} into words: {what}")
    return words


def joined(words: Sequence[str]) -> str:
    """Join words to one line, each quoted only if needed: `"Conv2d(3,8,1,padding_mode='reflect')"`."""
    return " ".join(map(_quoted, words))


def checked_operand(word: str, options: Sequence[str] = ("--except", "--expect")) -> str:
    """Return an operand. Negative numbers are one; any other word that starts with a dash raises RequestError."""
    if looks_like_option(word):
        raise RequestError(f"no such option: {word}", did_you_mean(word, options))
    return word


def looks_like_option(word: str) -> bool:
    """Whether a word starts with a dash, and is neither a negative number nor a list or range of numbers."""
    return word.startswith("-") and not _NEGATIVE.fullmatch(word)


def _unquoted(piece: str) -> str:
    match piece[0]:
        case "'":
            return piece[1:-1]
        case '"':
            return re.sub(r'\\(["\\])', r"\1", piece[1:-1])
        case "\\":
            return piece[1:]
    return piece


def _quoted(word: str) -> str:
    # Brackets and stars stay: it is a line of a recipe first. What a shell runs does not.
    if re.fullmatch(r"[^\s'\"\\#=$`;&|<>!~][^\s'\"\\$`;&|<>!]*", word):
        return word
    return quoted(word)
