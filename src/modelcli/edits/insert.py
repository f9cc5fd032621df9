"""insert: put a new module before a position of a sequence."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli.edits.declaring import FLAG, option
from modelcli.edits.holders import Holder, StateDictHolder, is_numbered
from modelcli.edits.picking import are_numbers
from modelcli.edits.placing import Arranged, Placing, renumber_option
from modelcli.errors import RequestError, did_you_mean
from modelcli.language import selectors
from modelcli.language.expressions import Call
from modelcli.language.quoting import quoted
from modelcli.model.paths import joined, shown
from modelcli.model.state_dict import StateDictModel, split_key
from modelcli.wording import listed


@dataclass(frozen=True, kw_only=True)
class Insert(Placing):
    """Insert a module before a position of a sequence whose children are `0..n-1`; later children move up.

    `renumber` treats the numbered children in a state dict of unknown architecture as such a sequence. With `after` the
    path is that of a child, and the module comes after it; among children with names it gets the lower-case name of its
    class, with a number from 2 on if that is taken.
    """

    renumber: bool = renumber_option()
    after: bool = option(
        "--after", FLAG, False, "Insert after the child of that path; children with names keep their names."
    )

    name: ClassVar[str] = "insert"
    summary: ClassVar[str] = "Insert a module before a position of a Sequential or ModuleList; later children move up."
    effect: ClassVar[str] = (
        "inserts a module before that position of a `Sequential` or `ModuleList`; later children move up. `--after` "
        "puts it behind the child of that path, which may have a name: `insert features.norm5 ReLU --after` adds "
        "`features.relu`, or `features.relu_2` if there is one"
    )
    in_pytorch: ClassVar[str] = "`model.features.insert(1, ...)`"
    example: ClassVar[str] = "features.1 'BatchNorm2d(64)'"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli insert features.1 'BatchNorm2d(_)' -m squeezenet1_1 -o out.pth",
        "modelcli insert classifier.0 'Dropout(0.2)' -m alexnet",
        "modelcli insert features.norm5 'Dropout(0.2)' --after -m densenet121",
    )
    handler: ClassVar[str] = "modelcli.live.surgery.insert"
    moves_paths: ClassVar[bool] = True

    def name_in(self, holder: Holder, word: str) -> str:
        where, size = _describe(holder), len(holder.children)
        if self.after and holder.is_sequence and not is_numbered(holder):
            _child_meant(holder, word)
            return _free_name(holder, self.module)
        if not is_numbered(holder):
            is_child = holder.is_sequence and selectors.plain(word) in holder.children
            raise RequestError(
                f"insert needs a Sequential or ModuleList with children 0 to n-1; {where} is neither",
                f"insert {quoted(joined(holder.path, word))} MODULE --after puts it behind that child"
                if is_child
                else f"add {quoted(joined(holder.path, 'NAME'))} MODULE puts a child with a name at the end",
            )
        if self.after:
            return str(_position_after(holder, word, size))
        position = position_of(word, size)
        if position is None or not 0 <= position <= size:
            raise _refuse_position(word, holder, size, f"append {quoted(shown(holder.path))}")
        return str(position)

    def arranged(self, holder: Holder, name: str) -> Mapping[str, str | None]:
        if self.after and not are_numbers([name]):
            before = _child_meant(holder, selectors.parse(self.path).components[-1])
            children: dict[str, str | None] = {}
            for child in holder.children:
                children[child] = child
                if child == before:
                    children[name] = None
            return children
        found: dict[str, str | None] = {_moved_up(child, int(name)): child for child in holder.children}
        found[name] = None
        return dict(sorted(found.items(), key=lambda item: int(item[0])))

    def settled(self, holder: str, name: str, module: Call) -> Self:
        if self.after and are_numbers([name]):
            return replace(super().settled(holder, name, module), after=False)
        if self.after:
            own = selectors.parse(self.path).components[-1]
            return super().settled(holder, selectors.plain(own) or own, module)
        return super().settled(holder, name, module)

    def placed(self, model: StateDictModel) -> tuple[str, Arranged]:
        path, word = self.place(model.blueprint)
        holder = StateDictHolder(model, path)
        return super().placed(model) if holder.is_known else (path, self._among_keys(holder, word))

    def _among_keys(self, holder: StateDictHolder, word: str) -> Arranged:
        """Insert among numbered children of a module of unknown type; there may be gaps, and tensors among them."""
        _require_numbers(holder.children, holder.path, self.renumber)
        entries = [split_key(name)[1] for name in holder.model.own_entries[holder.path]]
        numbers = [int(name) for name in (*entries, *holder.children) if are_numbers([name])]
        if self.after:
            word = str(1 + _number_meant(holder, word, numbers))
        position = position_of(word, len(numbers))
        if word.startswith("-") and position is not None and position >= 0:
            position = sorted(numbers)[position]
        if position is None or position < 0:
            last = f"insert {quoted(joined(holder.path, str(len(numbers))))}"
            raise _refuse_position(word, holder, len(numbers), last)
        name, there = str(position), holder.paths
        children = {new: None if old is None else there[old] for new, old in self.arranged(holder, name).items()}
        return Arranged(name, children, {entry: _moved_up(entry, position) for entry in entries})


def _child_meant(holder: Holder, word: str) -> str:
    """Return the name of the child that a word means. Raises RequestError if there is none."""
    name = selectors.plain(word)
    if name is None or name not in holder.children:
        raise RequestError(
            f"{_describe(holder)} has no child {word!r}",
            did_you_mean(word, holder.children) or f"it has {listed(holder.children, 8)}",
        )
    return name


def _free_name(holder: Holder, module: Call) -> str:
    """Return the lower-case name of a module's class, with a number behind it if the holder has that name."""
    name = re.split(r"[.:]", module.name)[-1].lower()

    def is_taken(name: str) -> bool:
        return name in holder.children or holder.has_tensor(name) or holder.has_attribute(name)

    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(free for free in candidates if not is_taken(free))


def _position_after(holder: Holder, word: str, size: int) -> int:
    """Return the position behind the child that a word means, in a sequence with `size` numbered children."""
    position = position_of(word, size)
    if position is None or not 0 <= position < size:
        raise _refuse_position(word, holder, size, f"append {quoted(shown(holder.path))}")
    return position + 1


def _number_meant(holder: Holder, word: str, numbers: Sequence[int]) -> int:
    """Return the number that a word means among the numbers of children and tensors; there may be gaps."""
    position = position_of(word, len(numbers))
    if word.startswith("-") and position is not None and position >= 0:
        position = sorted(numbers)[position]
    if position is None or position < 0:
        raise _refuse_position(word, holder, len(numbers), f"append {quoted(shown(holder.path))}")
    return position


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
