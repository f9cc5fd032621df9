"""Declarations of an edit's words and options, from which the command, its help, completion and lines are made."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any, NamedTuple

from modelcli.errors import RequestError

#: What completes a word: one of those below, or a function that gives words.
Completion = str | Callable[[], Iterable[str]]
#: Completes a word with paths of modules of the model at hand.
MODULES: Completion = "modules"
#: Completes a word with paths of modules and names of tensors of the model at hand.
TENSORS: Completion = "tensors"
#: Completes a word with classes of `torch.nn`, and others that need no trust.
CLASSES: Completion = "classes"
#: Completes a word with references of models: names of builders, and files. Such a word names another model.
REFERENCES: Completion = "references"
#: Completes a word with functions of `torch.nn.init`, as `init` takes them.
SCHEMES: Completion = "schemes"


class Operand(NamedTuple):
    """A positional word of an edit; with `several`, all remaining words.

    Attributes:
        name: what the words are called in an error of the command line: `target`.
        help: one line for `--help`.
        metavar: how the usage line shows it; by default the name in capitals.
        several: whether this takes all remaining words, at least one.
        completes: completes the first word.
        completes_later: completes each further word.
    """

    name: str
    help: str
    metavar: str | None = None
    several: bool = False
    completes: tuple[Completion, ...] = ()
    completes_later: tuple[Completion, ...] = ()


class Kind(NamedTuple):
    """How to read and write the value of an option.

    Attributes:
        read: returns the value for the option's name and one word; None for a flag, which takes no word.
        several: whether the option may be repeated; its value is then a tuple.
        text: returns the word for a value.
        type: the type that the command line converts the word to, before `read`.
        minimum: the smallest number that is accepted.
        bare: the word that the name of the option alone stands for. Another word then follows an `=`: `--keep=sum`.
    """

    read: Callable[[str, str], Any] | None
    several: bool = False
    text: Callable[[Any], str] = str
    type: type = str
    minimum: int | None = None
    bare: str | None = None


class Option(NamedTuple):
    """An option of an edit.

    Attributes:
        flag: its name on a command line: `--also`.
        kind: how its value is written.
        help: one line for `--help`.
        metavar: the name of its value in the help.
        default: how the help shows the default value.
        completes: completes its value.
    """

    flag: str
    kind: Kind
    help: str
    metavar: str | None = None
    default: str | None = None
    completes: tuple[Completion, ...] = ()

    def words(self, value: Any) -> list[str]:
        """Return the words that set this option to a value other than its default."""
        if self.kind.read is None:
            return [self.flag]
        if self.kind.bare is not None:
            return [self.flag if value == self.kind.bare else f"{self.flag}={self.kind.text(value)}"]
        values = value if self.kind.several else (value,)
        return [word for each in values for word in (self.flag, self.kind.text(each))]


def option(
    flag: str,
    kind: Kind,
    default: Any,
    help: str,  # noqa: A002 -- what Typer calls it too
    *,
    metavar: str | None = None,
    shown_default: str | None = None,
    completes: tuple[Completion, ...] = (),
) -> Any:
    """A field of an edit's class that is an option: see `Option`. `default` is the value where it is not given."""
    made = Option(flag, kind, help, metavar, shown_default, completes)
    return field(default=default, metadata={"option": made})


def selector(word: str) -> str:
    """Return the word if it is a selector. Raises RequestError if it is not."""
    from modelcli.language import selectors  # which takes time to import, and a look at a record needs no selector

    selectors.parse(word)
    return word


def finite_number(word: str) -> float:
    """The number that a word is: `-0.5`, `3`, `1e-3`. Raises RequestError for any other word, also for nan and inf."""
    number = float(word) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word, re.ASCII) else math.nan
    if not math.isfinite(number):
        raise RequestError(f"{word!r} is not a finite number", "write it as -0.5, 3 or 1e-3")
    return number


def number_text(number: float) -> str:
    """The word for a number, with all its digits: `finite_number` reads the same number from it."""
    return repr(float(number)).removesuffix(".0")


def _named_number(flag: str, word: str) -> float:
    try:
        return finite_number(word)
    except RequestError as error:
        raise RequestError(f"{flag}: {error.message}", error.hint) from None


def _number(flag: str, word: str) -> int:
    if not re.fullmatch(r"\d{1,9}", word, re.ASCII):
        raise RequestError(f"{flag} takes a number, not {word!r}")
    return int(word)


def choice(*words: str) -> Kind:
    """An option that takes one of some words behind an `=`; without one, it means the first of them."""

    def read(flag: str, word: str) -> str:
        if word not in words:
            raise RequestError(
                f"{flag} takes {', '.join(words[:-1])} or {words[-1]}, not {word!r}", f"{flag}={words[0]}"
            )
        return word

    return Kind(read, bare=words[0])


#: An option without a value.
FLAG = Kind(None)
#: An option that takes a whole number from 0.
NUMBER = Kind(_number, type=int, minimum=0)
#: An option that takes a finite number, whole or not.
FINITE_NUMBER = Kind(_named_number, text=number_text)
#: A repeatable option that takes a selector.
SELECTORS = Kind(lambda _flag, word: selector(word), several=True)
