"""Edits: one surgical operation each, as a frozen dataclass and as one line of text.

`parse("replace classifier.6 Linear(4096,10)")` gives a `Replace`; `str(edit)` gives the line back. A line has the
words and options of the command, split as a POSIX shell splits them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli import expressions, selectors
from modelcli.errors import RequestError, did_you_mean
from modelcli.expressions import Call


@dataclass(frozen=True)
class Edit:
    """What all edits have: selectors to take away, and the number of matches expected."""

    without: tuple[str, ...] = ()
    expect: int | None = None

    name: ClassVar[str]

    def operands(self) -> list[str]:
        """The words after the edit's name, without the options that all edits have."""
        raise NotImplementedError

    def __str__(self) -> str:
        operands, options = self.operands(), []
        for selector in self.without:
            options += ["--except", selector]
        if self.expect is not None:
            options += ["--expect", str(self.expect)]
        words = [*options, "--", *operands] if any(map(_looks_like_option, operands)) else [*operands, *options]
        return " ".join(map(_quoted, [self.name, *words]))


@dataclass(frozen=True, kw_only=True)
class Replace(Edit):
    """Put a new module in place of every match."""

    name: ClassVar[str] = "replace"
    target: str
    module: Call

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("replace takes a target and a module", "replace classifier.6 'Linear(4096,10)'")
        selectors.parse(words[0])
        return cls(target=words[0], module=expressions.parse_words(words[1:]))

    def operands(self) -> list[str]:
        return [self.target, expressions.to_text(self.module)]


@dataclass(frozen=True, kw_only=True)
class _Flag(Edit):
    targets: tuple[str, ...]

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Self:
        if not words:
            raise RequestError(f"{cls.name} takes at least one target", f"{cls.name} features")
        for word in words:
            selectors.parse(word)
        return cls(targets=tuple(words))

    def operands(self) -> list[str]:
        return list(self.targets)


@dataclass(frozen=True, kw_only=True)
class Freeze(_Flag):
    """Set `requires_grad` of the parameters that match to False."""

    name: ClassVar[str] = "freeze"


@dataclass(frozen=True, kw_only=True)
class Unfreeze(_Flag):
    """Set `requires_grad` of the parameters that match to True."""

    name: ClassVar[str] = "unfreeze"


#: Every edit by its name: the words of a line after that name, made into the edit.
REGISTRY: Mapping[str, Callable[[Sequence[str]], Edit]] = {
    kind.name: kind.from_words for kind in (Replace, Freeze, Unfreeze)
}


def parse(line: str) -> Edit:
    """Read one line. Raises RequestError that says which word is wrong."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise RequestError(f"cannot split {line!r} into words: {error}") from None
    if not words:
        raise RequestError("an empty edit", f"an edit is one of {', '.join(REGISTRY)}")
    return from_words(words[0], words[1:])


def from_words(name: str, words: Sequence[str]) -> Edit:
    """Make an edit of its name and the words after it, options included."""
    make = REGISTRY.get(name)
    if make is None:
        raise RequestError(
            f"no such edit: {name!r}",
            did_you_mean(name, REGISTRY) or f"an edit is one of {', '.join(REGISTRY)}",
        )
    operands: list[str] = []
    without: list[str] = []
    expect: int | None = None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            operands += rest
            break
        option, equals, value = word.partition("=")
        if option in ("--except", "--expect"):
            if not equals:
                if not rest:
                    raise RequestError(f"{option} takes a value")
                value = rest.pop(0)
            if option == "--except":
                selectors.parse(value)
                without.append(value)
            else:
                if not re.fullmatch(r"\d{1,9}", value, re.ASCII):
                    raise RequestError(f"--expect takes a number, not {value!r}")
                expect = int(value)
        else:
            operands.append(checked_operand(word))
    return replace(make(operands), without=tuple(without), expect=expect)


def checked_operand(word: str, options: Sequence[str] = ("--except", "--expect")) -> str:
    """A word that is no option: negative numbers are operands, anything else with a dash in front is a mistake."""
    if _looks_like_option(word):
        raise RequestError(f"no such option: {word}", did_you_mean(word, options))
    return word


def _looks_like_option(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word, re.ASCII)


def _quoted(word: str) -> str:
    """The word for a shell, quotes only where they are needed: `"Conv2d(3,8,1,padding_mode='reflect')"`."""
    if re.fullmatch(r"[^\s'\"\\]+", word):
        return word
    return f'"{word}"' if "'" in word and not re.search(r'["\\$`!]', word) else shlex.quote(word)
