"""Code that the edits that place a new module share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.base import Edit
from modelcli.edits.declaring import CLASSES, FLAG, MODULES, Operand, option, selector
from modelcli.edits.holders import Holder, StateDictHolder
from modelcli.errors import RequestError
from modelcli.language import expressions, selectors
from modelcli.language.expressions import Call
from modelcli.language.quoting import quoted
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import joined
from modelcli.model.state_dict import StateDictModel
from modelcli.wording import listed

#: The word for a path.
PATH = Operand("path", "A path: classifier.6.", completes=(MODULES,))
#: The words for a new module: a class, and then its arguments, which are anything.
MODULE = Operand("module", "Linear(4096,10), or Linear 4096 10.", "MODULE...", several=True, completes=(CLASSES,))


def renumber_option() -> bool:
    """Return the option of edits that renumber children."""
    text = "Renumber later children, even if the file does not record that they are a Sequential."
    return option("--renumber", FLAG, False, text)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Placing(Edit):
    """An edit that puts one new module at one path. `example` is a path and a module, for errors."""

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

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        path, arranged = self.placed(model)
        return put_new(self, model, context, path, arranged)

    def placed(self, model: StateDictModel) -> tuple[str, Arranged]:
        """Return the path of the module that gets a child, and its children including the new one.

        Raises RequestError if the new module cannot be put there.
        """
        path, word = self.place(model.blueprint)
        holder = StateDictHolder(model, path)
        name = self.name_in(holder, word)
        there = holder.paths
        children = {new: None if old is None else there[old] for new, old in self.arranged(holder, name).items()}
        return path, Arranged(name, children)

    def place(self, blueprint: Blueprint) -> tuple[str, str]:
        """Return the path of the module that gets a child, and the word for the child's name or position in it.

        Raises RequestError if there is no such module.
        """
        return holder_and_name(blueprint, self)

    def name_in(self, holder: Holder, word: str) -> str:
        """Return the name of the new child of a module, for a word of `place`. Raises RequestError for a wrong word."""
        raise NotImplementedError

    def arranged(self, holder: Holder, name: str) -> Mapping[str, str | None]:
        """Return the names of all children in order, each with its old name; the new child's old name is None."""
        return {child: child for child in holder.children} | {name: None}

    def settled(self, holder: str, name: str, module: Call) -> Self:
        """Return the edit without patterns and holes: it puts the module into that holder, under that name."""
        path = holder if self.line_names_holder else joined(holder, name)
        return replace(self, path=selectors.literal(path), module=module)

    #: Whether the resolved line has the path of the module that gets a child, and not that of the child.
    line_names_holder: ClassVar[bool] = False

    def example_line(self) -> str:
        """Return the words of the edit."""
        return f"{self.name} {self.example}"


def place_and_module(name: str, taken: str, words: Sequence[str]) -> tuple[str, Call]:
    """Return the path and the new module in an edit's words.

    Args:
        name: the edit's name.
        taken: what it takes besides one module, for errors: `replace takes one target`.
        words: at least two.

    Raises RequestError if they cannot be read, are in the wrong order, or contain several modules.
    """
    _refuse_swapped(name, words)
    _refuse_several(taken, words)
    return selector(words[0]), expressions.parse_words(words[1:])


def _refuse_swapped(name: str, words: Sequence[str]) -> None:
    """Refuse a module before its path: `replace 'Linear(1,2)' classifier.6`."""
    if len(words) == 2 and "(" in words[0] and "(" not in words[1] and expressions.is_expression(words[0]):
        raise RequestError(
            f"{name} takes the path before the module, but {words[0]!r} is a module",
            f"{name} {quoted(words[1])} {quoted(words[0])}",
        )


def _refuse_several(taken: str, words: Sequence[str]) -> None:
    """Refuse more than one module: `replace fc 'Linear(_,3)' 'Linear(3,4)'`."""
    given = words[1:]
    if len(given) > 1 and all("(" in word and expressions.is_expression(word) for word in given):
        one = quoted(f"Sequential({', '.join(given)})")
        raise RequestError(
            f"{taken} and one module, not {len(given)} modules: {listed(given, 3)}",
            f"write several modules as one: {one}",
        )


@dataclass(frozen=True)
class Arranged:
    """The children of a module after a new one is placed.

    Attributes:
        name: the name of the new child.
        children: the names of all children in order, each with its old path; None for the new child.
        entries: new names for the module's own entries.
    """

    name: str
    children: Mapping[str, str | None]
    entries: Mapping[str, str] = field(default_factory=dict)


def put_new(
    edit: Placing, model: StateDictModel, context: Context, path: str, arranged: Arranged
) -> Applied[StateDictModel]:
    """Put the new module of an edit among the children of the module at `path`."""
    there = joined(path, arranged.name)
    handler = edit.handler_module()
    call, new = handler.new_for_state_dict(edit, model, context, path, there)
    children = {name: new if child is None else child for name, child in arranged.children.items()}
    line = str(edit.settled(path, arranged.name, call))
    change = Change(there, edit.name, "", new.brief, 0, new.params, (line,))
    return Applied(model.with_children(path, children, arranged.entries), [change], inputs=context.inputs)


def holder_and_name(blueprint: Blueprint, edit: Placing) -> tuple[str, str]:
    """Return the path of the module that gets a child, and the last component of the edit's path as written.

    Raises RequestError if there is no such module, and for a path that cannot be that of a child.
    """
    parsed = selectors.parse(edit.path)
    if parsed.type is not None:
        raise RequestError(
            f"{edit.name} takes a path, but {edit.path!r} asks for a type", "write the path without a type"
        )
    *above, own = parsed.components or ("",)
    if parsed.landmark is not None:
        if not parsed.components:
            raise RequestError(
                f"{edit.path} is a module that is there, and {edit.name} takes the path of a new one",
                f"write {edit.path}.NAME",
            )
        above = [f"@{parsed.landmark}", *above]
    if not own:
        raise RequestError(f"{edit.name} takes the path of a new module, not of the model itself", edit.example_line())
    return selectors.select_one(blueprint, ".".join(above) or ".", edit.name), own
