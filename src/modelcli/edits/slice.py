"""slice: keep, reorder and repeat the children of sequences."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.declaring import FLAG, MODULES, Operand, option, selector
from modelcli.edits.picking import Part as Below
from modelcli.edits.picking import are_numbers, parts_below
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import shown
from modelcli.model.state_dict import Entry, NewModule, Part, StateDictModel, StateDictTensor, split_key
from modelcli.wording import brief_repr, counted, listed

_EXAMPLE = "slice model.layers 0-23,8-31"
_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?", re.ASCII)
#: The most children that a sequence may have afterwards.
MAX_CHILDREN = 100_000

#: The first and the last position of a range, which may be negative: -1 is the last child.
Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Slice(Selecting):
    """Keep the children of each matching sequence at the positions in `ranges`, in that order.

    A child that is named again is a copy with its own tensors; with `tied` it is the same module.
    """

    target: str
    ranges: tuple[Range, ...]
    tied: bool = option("--tied", FLAG, False, "Let repeated children share their tensors instead of copying them.")

    name: ClassVar[str] = "slice"
    summary: ClassVar[str] = "Keep, reorder and repeat the children of a Sequential or ModuleList."
    effect: ClassVar[str] = (
        "keeps the children at these positions, in this order: `0-23,8-31`, `3,2,1,0`, `0--2` for all but the last. A "
        "child that is named again is a copy with its own tensors; `--tied` shares them"
    )
    in_pytorch: ClassVar[str] = "`model.layers = nn.ModuleList(model.layers[i] for i in (0, 1, 3))`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli slice features 0-5 -m squeezenet1_1 --check none -o start.pth",
        "modelcli slice encoder.layers 0,2,4,6,8,10 -m vit_b_16 -o half.pth",
        "modelcli slice 'layer*' 0 -m resnet18 -o shallow.pth",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand("target", "A selector of sequences: model.layers, '**.experts'.", completes=(MODULES,)),
        Operand("ranges", "Positions, first and last included: 0-23,8-31, or 3,2,1,0."),
    )
    also_called: ClassVar[tuple[str, ...]] = ("reorder", "repeat", "keep", "truncate")
    handler: ClassVar[str] = "modelcli.live.surgery.slice"
    moves_paths: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) != 2:
            raise RequestError("slice takes one target and the positions to keep", _EXAMPLE)
        return cls(target=selector(words[0]), ranges=tuple(map(_range, words[1].split(","))))

    def operands(self) -> list[str]:
        return [self.target, ranges_text(self.ranges)]

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        paths = sliced_paths(self, model.blueprint)
        children: dict[str, dict[str, str | NewModule]] = {}
        kept: dict[str, list[int]] = {}
        sizes: dict[str, int] = {}
        identity = model.next_identity
        for path in paths:
            there, prefix = numbered_children(model, path)
            sizes[path] = 1 + max(there)
            kept[path] = positions(self, sizes[path], path)
            if not any(number in there for number in kept[path]):
                raise RequestError(f"{self} would leave no tensor of {shown(path)}")
            children[path], identity = self._children(model, there, prefix, kept[path], identity)
        sliced = model.with_children_of(children)
        before, after = parts_below(model, paths), parts_below(sliced, paths)
        changes = [
            change_of(self, path, (sizes[path], before[path].params), (len(kept[path]), after[path].params), kept[path])
            for path in paths
        ]
        return Applied(sliced, changes, notes([(kept[path], sizes[path]) for path in paths]), context.inputs)

    def _children(
        self, model: StateDictModel, there: Mapping[int, str], prefix: str, kept: Sequence[int], identity: int
    ) -> tuple[dict[str, str | NewModule], int]:
        """Return the new children of one sequence, and the next free identity of a tensor."""
        children: dict[str, str | NewModule] = {}
        briefs = parts_below(model, [there[number] for number in dict.fromkeys(kept) if number in there])
        seen: set[int] = set()
        for place, number in enumerate(kept):
            if number not in there:  # a module without tensors has no key
                continue
            new = f"{prefix}{place}"
            if number in seen and not self.tied:
                copied = _copy_of(model, there[number], identity, briefs[there[number]])
                identity += copied.identities
                children[new] = copied
            else:
                children[new] = there[number]
            seen.add(number)
        return children, identity


def sliced_paths(edit: Slice, blueprint: Blueprint) -> list[str]:
    """Return the paths of the sequences to slice. Raises RequestError if one of them lies inside another one."""
    paths = selectors.select_modules(blueprint, [edit.target], without=edit.without, expect=edit.expect)
    selectors.refuse_nested(paths, hint="slice the outer one first, and the inner ones with a second edit")
    return paths


def numbered_children(model: StateDictModel, path: str) -> tuple[dict[int, str], str]:
    """Return the paths of a module's children by their numbers, and what stands before the number in their names.

    Raises RequestError where they have other names, or tensors stand among them.
    """
    names = {below.rpartition(".")[2]: below for below in model.children[path]}
    prefix = prefix_of(list(names))
    info = model.modules[path].info
    if prefix is None or (info is not None and not info.is_sequence):
        raise not_numbered(path, None if info is None else info.type)
    own = [name for name in model.own_entries[path] if are_numbers([split_key(name)[1]])]
    if own:
        raise RequestError(
            f"{own[0]} is a tensor among the numbered children of {shown(path)}, and slice takes modules",
            "rename gives tensors other numbers",
        )
    return {int(name.removeprefix(prefix)): below for name, below in names.items()}, prefix


def prefix_of(names: Sequence[str]) -> str | None:
    """Return what the names of numbered children have in common: nothing for `0`, `layer_` for `layer_0`.

    None if they are not the same text with different numbers behind it, or there are no names.
    """
    if not names:
        return None
    prefix = names[0].rstrip("0123456789")
    numbers = [name.removeprefix(prefix) for name in names]
    return prefix if all(name.startswith(prefix) for name in names) and are_numbers(numbers) else None


def change_of(edit: Slice, path: str, before: tuple[int, int], after: tuple[int, int], kept: Sequence[int]) -> Change:
    """Return the row: the numbers of children and of parameters `before` and `after`."""
    was, now = (counted(size, "child", "children") for size, _ in (before, after))
    return Change(path, edit.name, was, now, before[1], after[1], (str(settled(edit, path, kept)),))


def notes(sequences: Iterable[tuple[Sequence[int], int]]) -> list[str]:
    """Return the note that names what is left out, given the positions that each sequence keeps, and its old size.

    Sequences that lose other positions than the first one have one note together.
    """
    left = {tuple(number for number in range(size) if number not in set(kept)) for kept, size in sequences}
    if len(left) > 1:
        return [f"the sequences lose {min(map(len, left))} to {max(map(len, left))} children each"]
    gone = [str(number) for number in next(iter(left))]
    return [f"{'child' if len(gone) == 1 else 'children'} {listed(gone, 8)} left out"] if gone else []


def _range(word: str) -> Range:
    match = _RANGE.fullmatch(word.strip())
    if match is None:
        raise RequestError(
            f"{word!r} is no position and no range of positions", f"{_EXAMPLE}, or slice features 3,2,1,0"
        )
    if any(len(number.lstrip("-")) > len(str(MAX_CHILDREN)) for number in match.groups() if number):
        raise RequestError(
            f"{brief_repr(word)} is beyond the {MAX_CHILDREN:,} children that a sequence may have", _EXAMPLE
        )
    first = int(match[1])
    return first, first if match[2] is None else int(match[2])


def ranges_text(ranges: Sequence[Range]) -> str:
    """Return the word for ranges of positions: `0-23,8-31`."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def settled(edit: Slice, path: str, kept: Sequence[int]) -> Slice:
    """Return the edit with a literal path and positions from 0, written as ranges."""
    ranges: list[Range] = []
    for number in kept:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    settled_target = selectors.literal(path) if path else "."
    return replace(edit, target=settled_target, without=(), expect=None, ranges=tuple(ranges))


def positions(edit: Slice, size: int, path: str) -> list[int]:
    """Return the positions to keep among `size` children. A range that goes down counts down.

    Raises RequestError for a position that is not there, and if the result would be empty or too large.
    """
    found: list[int] = []
    for ends in edit.ranges:
        first, last = (end + size if end < 0 else end for end in ends)
        for given, end in zip(ends, (first, last), strict=True):
            if not 0 <= end < size:
                raise RequestError(
                    f"{given} is no position in {shown(path)}, whose children are 0 to {size - 1}",
                    f"slice {quoted(edit.target)} 0-{size - 1} keeps them all",
                )
        found += range(first, last + 1) if first <= last else range(first, last - 1, -1)
        if len(found) > MAX_CHILDREN:
            raise RequestError(f"slice would make more than {MAX_CHILDREN:,} children", "name fewer positions")
    return found


def not_numbered(path: str, kind: str | None) -> RequestError:
    """Return the error for a module that is no sequence with numbered children."""
    what = "has children with names" if kind is None else f"is a {kind}"
    return RequestError(
        f"slice takes the numbered children of a Sequential or ModuleList, but {path or 'the model itself'} {what}",
        "modelcli modules --tree shows the sequences of the model",
    )


def _copy_of(model: StateDictModel, path: str, identity: int, part: Below) -> NewModule:
    """Return a copy of a module with its own tensors, which count from `identity`. Ties inside it stay.

    `part` is what lies below the module.
    """
    identities: dict[int, int] = {}

    def copied(entry: Entry) -> Entry:
        if not isinstance(entry, StateDictTensor):
            return entry
        number = identities.setdefault(entry.identity, identity + len(identities))
        return replace(entry, identity=number, copied=identity)  # a number that no other copy has

    parts: list[Part] = []
    made: dict[int, object] = {}
    for below in model.modules_below(path):
        module = model.modules[below]
        if module.made is not None:
            module = replace(module, made=made.setdefault(id(module.made), copy.deepcopy(module.made)))
        own = [(split_key(name)[1], copied(model.entries[name])) for name in model.own_entries[below]]
        parts.append((below.removeprefix(path).removeprefix("."), module, own))
    return NewModule(tuple(parts), part.brief, part.params, len(identities))
