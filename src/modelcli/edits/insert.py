"""insert: put a new module before a position of a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.holders import Holder, StateDictHolder, is_numbered
from modelcli.edits.picking import are_numbers
from modelcli.edits.placing import Arranged, Placing, renumber_option
from modelcli.errors import RequestError
from modelcli.language.quoting import quoted
from modelcli.model.paths import joined, shown
from modelcli.model.state_dict import StateDictModel, split_key


@dataclass(frozen=True, kw_only=True)
class Insert(Placing):
    """Insert a module before a position of a sequence whose children are `0..n-1`; later children move up.

    `renumber` treats the numbered children in a state dict of unknown architecture as such a sequence.
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

    def name_in(self, holder: Holder, word: str) -> str:
        where, size = _describe(holder), len(holder.children)
        if not is_numbered(holder):
            raise RequestError(
                f"insert needs a Sequential or ModuleList with children 0 to n-1; {where} is neither",
                f"add {quoted(joined(holder.path, 'NAME'))} MODULE puts a child with a name at the end",
            )
        position = position_of(word, size)
        if position is None or not 0 <= position <= size:
            raise _refuse_position(word, holder, size, f"append {quoted(shown(holder.path))}")
        return str(position)

    def arranged(self, holder: Holder, name: str) -> Mapping[str, str | None]:
        found: dict[str, str | None] = {_moved_up(child, int(name)): child for child in holder.children}
        found[name] = None
        return dict(sorted(found.items(), key=lambda item: int(item[0])))

    def placed(self, model: StateDictModel) -> tuple[str, Arranged]:
        path, word = self.place(model.blueprint)
        holder = StateDictHolder(model, path)
        return super().placed(model) if holder.is_known else (path, self._among_keys(holder, word))

    def _among_keys(self, holder: StateDictHolder, word: str) -> Arranged:
        """Insert among numbered children of a module of unknown type; there may be gaps, and tensors among them."""
        _require_numbers(holder.children, holder.path, self.renumber)
        entries = [split_key(name)[1] for name in holder.model.own_entries[holder.path]]
        numbers = [int(name) for name in (*entries, *holder.children) if are_numbers([name])]
        position = position_of(word, len(numbers))
        if word.startswith("-") and position is not None and position >= 0:
            position = sorted(numbers)[position]
        if position is None or position < 0:
            last = f"insert {quoted(joined(holder.path, str(len(numbers))))}"
            raise _refuse_position(word, holder, len(numbers), last)
        name, there = str(position), holder.paths
        children = {new: None if old is None else there[old] for new, old in self.arranged(holder, name).items()}
        return Arranged(name, children, {entry: _moved_up(entry, position) for entry in entries})


def _describe(holder: Holder) -> str:
    """Return the path and the type of a module, for errors."""
    return f"{shown(holder.path)} {holder.type}"


def _moved_up(name: str, position: int) -> str:
    """Return the new name of a numbered child or key after a child is inserted at a position."""
    return str(int(name) + (int(name) >= position)) if are_numbers([name]) else name


def _refuse_position(word: str, holder: Holder, size: int, last: str) -> RequestError:
    """Return the error for a word that is not a position among `size` children; `last` puts a module at the end."""
    return RequestError(
        f"{word!r} is no position in {_describe(holder)}, whose children are 0 to {size - 1}"
        if size
        else f"{word!r} is no position in {_describe(holder)}, which has no children yet",
        f"insert {quoted(joined(holder.path, '0'))} puts it first, {last} last",
    )


def position_of(word: str, size: int) -> int | None:
    """Return the position that a word means; `-1` is the position before the last child."""
    digits = word.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 9:
        return None
    return int(word) + (size if word.startswith("-") else 0)


def _require_numbers(children: Iterable[str], path: str, renumber: bool) -> None:
    """Raise RequestError if a module of unknown type has no numbered children, or `--renumber` was not given."""
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
