"""What edits share that put a new module somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits.base import Edit
from modelcli.edits.declaring import CLASSES, FLAG, MODULES, Operand, option, selector
from modelcli.errors import RequestError
from modelcli.language import expressions
from modelcli.language.expressions import Call
from modelcli.language.quoting import quoted
from modelcli.wording import listed

#: The word for a path.
PATH = Operand("path", "A path: classifier.6.", completes=(MODULES,))
#: The words for a new module: a class, and then its arguments, which are anything.
MODULE = Operand("module", "Linear(4096,10), or Linear 4096 10.", "MODULE...", several=True, completes=(CLASSES,))


def renumber_option() -> bool:
    """The option of edits that renumber children."""
    text = "The numbered children of a bare checkpoint are a sequence."
    return option("--renumber", FLAG, False, text)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Placing(Edit):
    """An edit that puts one new module at one path. `example` are a path and a module, for an error."""

    example: ClassVar[str]
    path: str
    module: Call

    words: ClassVar[tuple[Operand, ...]] = (PATH, MODULE)
    places_module: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError(f"{cls.name} takes a path and a module", f"{cls.name} {cls.example}")
        place, call = place_and_module(cls.name, f"{cls.name} takes one path", words)
        return cls(path=place, module=call)

    def operands(self) -> list[str]:
        return [self.path, expressions.to_text(self.module)]

    @classmethod
    def again(cls, path: str) -> str:
        return f"{cls.name} {quoted(path)}"

    def example_line(self) -> str:
        """How such an edit is written."""
        return f"{self.name} {self.example}"


def place_and_module(name: str, taken: str, words: Sequence[str]) -> tuple[str, Call]:
    """The place and the new module of an edit's words.

    Args:
        name: the edit's name.
        taken: what it takes besides one module, for an error: `replace takes one target`.
        words: at least two.

    Raises RequestError where they cannot be read, are the wrong way round, or name several modules.
    """
    _refuse_swapped(name, words)
    _refuse_several(taken, words)
    return selector(words[0]), expressions.parse_words(words[1:])


def _refuse_swapped(name: str, words: Sequence[str]) -> None:
    """Refuse a module before its place: `replace 'Linear(1,2)' classifier.6`."""
    if len(words) == 2 and "(" in words[0] and "(" not in words[1] and expressions.is_expression(words[0]):
        raise RequestError(
            f"{name} takes the place before the module, and {words[0]!r} is a module",
            f"{name} {quoted(words[1])} {quoted(words[0])}",
        )


def _refuse_several(taken: str, words: Sequence[str]) -> None:
    """Refuse more modules than one: `replace fc 'Linear(_,3)' 'Linear(3,4)'`."""
    given = words[1:]
    if len(given) > 1 and all("(" in word and expressions.is_expression(word) for word in given):
        one = quoted(f"Sequential({', '.join(given)})")
        raise RequestError(
            f"{taken} and one module, not {len(given)} modules: {listed(given, 3)}", f"several go in as one: {one}"
        )
