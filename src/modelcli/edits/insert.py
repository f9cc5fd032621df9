"""insert: a new module before a position of a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.picking import are_numbers
from modelcli.edits.placing import Arranged, Placing, holder_and_name, is_numbered, kind_of, own_names, renumber_option
from modelcli.errors import RequestError
from modelcli.language.quoting import quoted
from modelcli.model.paths import joined, shown
from modelcli.model.state_dict import StateDictModel, split_key


@dataclass(frozen=True, kw_only=True)
class Insert(Placing):
    """Insert before a position of a sequence whose children are `0..n-1`; the later ones move up.

    `renumber` says that the numbered children of a bare checkpoint are such a sequence.
    """

    renumber: bool = renumber_option()

    name: ClassVar[str] = "insert"
    summary: ClassVar[str] = "Insert a module before a position of a Sequential or ModuleList; later children move up."
    effect: ClassVar[str] = (
        "inserts a module before that position of a `Sequential` or `ModuleList`; later children move up"
    )
    in_pytorch: ClassVar[str] = "`model.features.insert(1, ...)`"
    example: ClassVar[str] = "features.1 'BatchNorm2d(64)'"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli insert features.1 'BatchNorm2d(_)' -m squeezenet1_1 -o out.pth",
        "modelcli insert classifier.0 'Dropout(0.2)' -m alexnet",
    )
    handler: ClassVar[str] = "modelcli.live.surgery.insert"
    moves_paths: ClassVar[bool] = True

    def placed(self, model: StateDictModel) -> tuple[str, Arranged]:
        path, word = holder_and_name(model.blueprint, self)
        is_known = model.modules[path].info is not None
        where = f"{shown(path)} {kind_of(model, path)}"
        children = dict(zip(own_names(model, path), model.children[path], strict=True))
        entries = [split_key(name)[1] for name in model.own_entries[path]]
        if not is_known:
            _require_numbers(children, path, self.renumber)
        elif not is_numbered(model, path):
            raise refuse_no_sequence(path, where)
        numbers = [int(name) for name in ((*entries, *children) if not is_known else children) if are_numbers([name])]
        position = position_of(word, len(numbers))
        if not is_known and word.startswith("-") and position is not None and position >= 0:
            position = sorted(numbers)[position]  # its numbers have gaps
        if position is None or (position > len(numbers) and is_known) or position < 0:
            raise refuse_position(word, path, where, len(numbers), is_known=is_known)

        def moved(name: str) -> str:
            if not are_numbers([name]):
                return name
            return str(int(name) + (int(name) >= position))

        found: dict[str, str | None] = {moved(name): child for name, child in children.items()}
        found[str(position)] = None
        renamed = {} if is_known else {name: moved(name) for name in entries}
        ordered = dict(sorted(found.items(), key=lambda item: int(item[0])))
        return path, Arranged(str(position), ordered, renamed)


def refuse_no_sequence(path: str, where: str) -> RequestError:
    """The error for a module whose children have no positions."""
    return RequestError(
        f"insert needs a Sequential or ModuleList with children 0 to n-1; {where} is neither",
        f"add {quoted(joined(path, 'NAME'))} MODULE puts a child with a name at the end",
    )


def refuse_position(word: str, path: str, where: str, size: int, *, is_known: bool) -> RequestError:
    """The error for a word that is no position among so many children."""
    last = f"append {quoted(shown(path))}" if is_known else f"insert {quoted(joined(path, str(size)))}"
    return RequestError(
        f"{word!r} is no position in {where}, whose children are 0 to {size - 1}"
        if size
        else f"{word!r} is no position in {where}, which has no children yet",
        f"insert {quoted(joined(path, '0'))} puts it first, {last} last",
    )


def position_of(word: str, size: int) -> int | None:
    """The number that a word means: `-1` is the place before the last child."""
    digits = word.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 9:
        return None
    return int(word) + (size if word.startswith("-") else 0)


def _require_numbers(children: Iterable[str], path: str, renumber: bool) -> None:
    """Raise RequestError where the children of a module of unknown type cannot be, or are not said to be, in order."""
    if not are_numbers(children):
        raise RequestError(
            f"insert takes a place among numbered children, and those of {shown(path)} have names",
            f"add {quoted(joined(path, 'NAME'))} MODULE puts a child with a name at the end",
        )
    if not renumber:
        raise RequestError(
            f"nothing in the file says that the children of {shown(path)} are a sequence",
            "--renumber says so, and moves the later ones up; add takes a name that is free",
        )
