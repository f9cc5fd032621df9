"""The words of an edit's line: split as a POSIX shell splits them, quoted where one needs that, told from options."""

from __future__ import annotations

import re
from collections.abc import Sequence

from modelcli.errors import RequestError, did_you_mean
from modelcli.language.quoting import quoted

#: What a word is made of for a POSIX shell: plain characters, quoted ones, and those behind a backslash.
_PIECE = r"""[^ \t\r\n'"\\]+|'[^']*'|"(?:[^"\\]|\\.)*"|\\."""
_PIECES = re.compile(_PIECE, re.DOTALL)
#: It always matches, and so never tries again. A # where a word could begin starts a comment.
_WORD = re.compile(rf"(?:[ \t\r\n]+|#[^\r\n]*)*((?:{_PIECE})*)", re.DOTALL)


def split(line: str) -> list[str]:
    """The words of a POSIX shell, in time that grows with the line: a word that starts with `#` starts a comment.

    Raises RequestError for a quote without an end.
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
    """One line of words, each in quotes only where it needs them: `"Conv2d(3,8,1,padding_mode='reflect')"`."""
    return " ".join(map(_quoted, words))


def checked_operand(word: str, options: Sequence[str] = ("--except", "--expect")) -> str:
    """A word that is no option: negative numbers are operands, anything else that starts with a dash is a mistake."""
    if looks_like_option(word):
        raise RequestError(f"no such option: {word}", did_you_mean(word, options))
    return word


def looks_like_option(word: str) -> bool:
    """Whether a word starts as an option does, and is no negative number."""
    return word.startswith("-") and not re.fullmatch(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word, re.ASCII)


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
