"""Edits as lines of text: `parse("replace classifier.6 Linear(4096,10)")` gives a `Replace`, `str(edit)` the line.

A line has the words and options of the command, split as a POSIX shell splits them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from modelcli.edits import registry
from modelcli.edits.base import Edit
from modelcli.edits.words import checked_operand, split_words
from modelcli.errors import RequestError, did_you_mean


def parse(line: str) -> Edit:
    """Parse one line. Raises RequestError, which names the wrong word."""
    words = split_words(line)
    if not words:
        raise RequestError("an empty edit", f"the edits are {', '.join(registry.names())}")
    return from_words(words[0], words[1:])


def parse_all(lines: Iterable[tuple[str, object]]) -> list[Edit]:
    """Parse many lines, each with its location: `head.toml:5`. Edits among them are returned as they are.

    Raises one RequestError, which names every wrong line.
    """
    made: list[Edit] = []
    problems = []
    for place, line in lines:
        try:
            if not isinstance(line, str | Edit):
                raise RequestError(f"an edit must be a string, not {line!r}")
            made.append(parse(line) if isinstance(line, str) else line)
        except RequestError as error:
            problems.append(f"{place}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    if problems:
        raise RequestError("\n".join(problems))
    return made


def kind_of(line: str) -> type[Edit]:
    """Return the class of a line's edit, without parsing the rest of the line.

    Raises RequestError if its first word is not the name of an edit.
    """
    return kind_called(next(iter(split_words(line)), ""))


def from_words(name: str, words: Sequence[str]) -> Edit:
    """Return the edit with this name and these words, which include options."""
    kind = kind_called(name)
    options = kind.option_fields()
    operands: list[str] = []
    given: dict[str, Any] = {}
    several: dict[str, list[Any]] = {}
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if word == "--":
            operands += rest
            break
        flag, equals, value = word.partition("=")
        item = options.get(flag)
        if item is None:
            operands.append(checked_operand(word, tuple(options)))
            continue
        how = item.metadata["option"].kind
        if how.read is None:
            if equals:
                raise RequestError(f"{flag} takes no value")
            given[item.name] = True
            continue
        if not equals and how.bare is not None:
            value = how.bare
        elif not equals:
            if not rest:
                raise RequestError(f"{flag} takes a value")
            value = rest.popleft()
        read = how.read(flag, value)
        if how.several:
            several.setdefault(item.name, []).append(read)
        else:
            given[item.name] = read
    given.update((key, tuple(read)) for key, read in several.items())
    return replace(kind.from_operands(operands), **given)


def kind_called(name: str) -> type[Edit]:
    """Return the class of the edit with this name. Raises RequestError if there is none."""
    kind = registry.find(name)
    if kind is None:
        names = registry.names()
        raise RequestError(f"no such edit: {name!r}", did_you_mean(name, names) or f"the edits are {', '.join(names)}")
    return kind
