"""What edits have in common that make tensors of a state dict from the elements of others, without reading them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.base import Edit
from modelcli.edits.declaring import Kind
from modelcli.edits.key_names import check_names
from modelcli.edits.picking import names_of_one, tie_notes
from modelcli.edits.scaled import hint_to_dequantize
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model.blueprint import Blueprint
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.joined_tensors import made_of, place_of, seen_through, tied_at
from modelcli.model.paths import ancestors, parent_of
from modelcli.model.scaled_weights import scaled_weights
from modelcli.model.state_dict import Entry, StateDictModel, StateDictModule, StateDictTensor, of_entries
from modelcli.model.tensors import Shape
from modelcli.wording import counted, listed

#: The number of changes that fill a screen; more become one change.
_ROWS = 20
#: How many names a change lists.
_LISTED = 4


@dataclass(frozen=True)
class Match:
    """The tensors that one set of new tensors is made of, by their names, in the order in which an edit takes them."""

    old: tuple[str, ...]
    new: tuple[str, ...]


class Targeting(Protocol):
    """An edit of the tensors that selectors pick."""

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def without(self) -> tuple[str, ...]: ...

    @property
    def expect(self) -> int | None: ...


class Result(NamedTuple):
    """What one new tensor is made of.

    Attributes:
        parts: the tensors whose elements it has, as views of what the old ones are views of.
        dim: the axis along which they are joined.
        shape: its shape, if it has one part and another shape than that.
    """

    parts: Sequence[StateDictTensor]
    dim: int = 0
    shape: Shape | None = None


#: Returns what the new tensors of a match are made of, given the old ones. Raises RequestError if these do not fit.
Make = Callable[[Match, Sequence[StateDictTensor]], Sequence[Result]]


# --- words -----------------------------------------------------------------------------------------------------------


def _dim(flag: str, word: str) -> int:
    if not re.fullmatch(r"-?\d{1,4}", word, re.ASCII):
        raise RequestError(f"{flag} takes the number of an axis, not {word!r}", f"{flag} 0, or {flag} -1 for the last")
    return int(word)


def numbers_of(word: str, what: str, example: str, *, least: int = 0) -> tuple[int, ...]:
    """Return the numbers in a word like `64,8,8`.

    Args:
        word: the word.
        what: what it has, for the error: `sizes`.
        example: a line that works.
        least: the smallest number that is accepted.

    Raises RequestError for any other word.
    """
    found = [int(part) for part in word.split(",") if re.fullmatch(r"-?\d{1,18}", part, re.ASCII)]
    if len(found) < word.count(",") + 1 or min(found) < least:
        raise RequestError(f"{word!r} is no list of {what}: they are numbers from {least}, with commas", example)
    return tuple(found)


def numbers_text(numbers: Iterable[int]) -> str:
    """Return the word for numbers: `64,8,8`."""
    return ",".join(map(str, numbers))


#: An option that takes the number of an axis; a negative one counts from the end.
DIM = Kind(_dim)


# --- names -----------------------------------------------------------------------------------------------------------


def tensor_names(model: StateDictModel) -> list[str]:
    """Return the keys of all tensors, quantized and sparse ones included."""
    known = model.blueprint.by_name
    return [name for name in model.entries if name in known]


def matching(edit: Edit, old: str, others: Sequence[str], model: StateDictModel) -> Iterator[tuple[str, list[str]]]:
    """Yield each key that matches `old`, and what the other patterns make of it. Raises RequestError if none does."""
    blueprint, example = model.blueprint, str(edit)
    made = [selectors.renaming(old, other, blueprint, _example(edit)) for other in others]
    captured = selectors.capturing(old, blueprint, edit.name)
    found = [name for name in tensor_names(model) if captured(name) is not None]
    if not found:
        raise no_tensor(old, blueprint, example)
    for name in found:
        yield name, [new for each in made if (new := each(name)) is not None]


def picked(edit: Targeting, model: StateDictModel) -> tuple[list[Match], list[str]]:
    """Return the tensors that an edit changes under their own names, all those of a tied one, and notes on ties."""
    blueprint = model.blueprint
    found = selectors.select_tensors(blueprint, edit.targets, without=edit.without, expect=edit.expect)
    there = [name for name in found if name in model.entries]
    if not there:
        raise RequestError(f"{found[0]} lies inside an entry of the file that is no tensor", "name a tensor")
    known = blueprint.by_name
    chosen = {known[name].identity for name in there}
    names = [name for name in tensor_names(model) if known[name].identity in chosen]
    return [Match((name,), (name,)) for name in names], tie_notes(names_of_one(blueprint), there, "changed")


def no_tensor(pattern: str, blueprint: Blueprint, line: str) -> RequestError:
    """Return the error for a pattern that no key matches."""
    selector = selectors.parse(pattern)
    if selectors.matched_modules(selector, blueprint):
        below = sorted(name for name in selectors.matched_tensors(selector, blueprint))
        return RequestError(
            f"{pattern!r} is a module, not a key: {line}", f"its keys are {listed(below, _LISTED)}" if below else None
        )
    return selectors.no_match(selector, blueprint, "tensors")


def _example(edit: Edit) -> str:
    """Return the first example of an edit without the program and the model."""
    return edit.examples[0].partition(" ")[2].partition(" -m ")[0]


# --- tensors ---------------------------------------------------------------------------------------------------------


def axis_of(dim: int, axes: int, name: str, shape: Sequence[int], flag: str = "--dim") -> int:
    """Return an axis, counted from 0. Raises RequestError if a tensor does not have it."""
    if not -axes <= dim < axes:
        have = (
            f"{flag} goes from {-axes} to {axes - 1}"
            if axes
            else f"reshape {quoted(selectors.literal(name))} 1 gives it an axis"
        )
        raise RequestError(f"{name} has the shape {list(shape)}, and so no axis {dim}", have)
    return dim % axes


def alike(edit: Edit, names: Sequence[str], tensors: Sequence[StateDictTensor], dim: int | None) -> None:
    """Raise RequestError if tensors to be joined differ in dtype or flag, or in shape except for axis `dim`."""
    first, shape = names[0], tensors[0].shape or ()
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.dtype != tensors[0].dtype:
            narrow, wide = sorted(
                [(name, tensor.dtype), (first, tensors[0].dtype)], key=lambda item: ITEM_BYTES.get(item[1], 0)
            )
            raise RequestError(
                f"{first} is {tensors[0].dtype} and {name} is {tensor.dtype}, and one tensor has one dtype",
                f"cast {quoted(selectors.literal(narrow[0]))} {wide[1]} first",
            )
        own = tensor.shape or ()
        if len(own) != len(shape) or any(
            one != other for axis, (one, other) in enumerate(zip(own, shape, strict=True)) if axis != dim
        ):
            differ = "they may differ" if dim is not None else "their shapes have to be the same"
            only = f" only in axis {dim}" if dim is not None else ""
            raise RequestError(
                f"{first} has the shape {list(shape)} and {name} {list(own)}",
                f"for {edit.name} {differ}{only}; reshape and permute change a shape",
            )
    flags = {tensor.requires_grad: name for name, tensor in zip(names, tensors, strict=True)}
    if True in flags and False in flags:
        raise RequestError(
            f"{flags[False]} is frozen and {flags[True]} is trained, and one tensor is one of both",
            f"freeze {quoted(selectors.literal(flags[True]))} first, "
            f"or unfreeze {quoted(selectors.literal(flags[False]))}",
        )


def narrowed(tensor: StateDictTensor, dim: int, start: int, length: int) -> StateDictTensor:
    """Return a part of a tensor along an axis, as `tensor.narrow(dim, start, length)` does."""
    shape = tensor.shape or ()
    return replace(
        tensor,
        shape=(*shape[:dim], length, *shape[dim + 1 :]),
        offset=tensor.offset + start * tensor.stride[dim] if length else tensor.offset,
    )


def require_plain(edit: Edit, model: StateDictModel, names: Collection[str]) -> None:
    """Raise RequestError for a tensor whose elements cannot be taken apart or joined alone."""
    known = model.blueprint.by_name
    for name in names:
        tensor, info = model.entries[name], known[name]
        if not isinstance(tensor, StateDictTensor):
            shape = list(info.shape or ())
            raise RequestError(
                f"{name} is no dense tensor: its layout is {info.layout}, its shape {shape}",
                f"{edit.name} takes plain tensors: name others, or make this one dense in PyTorch first",
            )
        if tensor.shape is None:
            raise RequestError(
                f"{name} has no shape yet, because its module is lazy",
                "replace it by a module with all sizes, such as Linear(4096,10)",
            )
        if tensor.source is None:
            raise RequestError(f"{name} {list(tensor.shape)} has no values: no file and no edit provides them")
    dtypes = {tensor.name: tensor.dtype for tensor in model.blueprint.tensors}
    pairs = scaled_weights(dtypes)
    if (found := next((name for name in names if name in pairs), None)) is not None:
        pair = pairs[found]
        raise RequestError(
            f"{pair.weight} {list(known[pair.weight].shape or ())} is {pair.how}, whose values are its elements times "
            f"{pair.scale}: the scales would not fit afterwards",
            hint_to_dequantize(pair, dtypes, "bfloat16"),
        )


# --- the edit --------------------------------------------------------------------------------------------------------


def carried_out(
    edit: Edit,
    model: StateDictModel,
    matches: Sequence[Match],
    make: Make,
    context: Context,
    notes: Sequence[str] = (),
) -> Applied[StateDictModel]:
    """Return the model with new tensors in the places of those that they are made of.

    Old tensors that are tied, and all taken in the same way, give new ones that are tied. `notes` come before others.

    Raises RequestError for tensors that do not fit, and for names that tensors cannot have.
    """
    used: dict[str, Match] = {}
    for match in matches:
        for name in match.old:
            if name in used:
                raise RequestError(f"{name} would be used twice: for {used[name].new[0]} and for {match.new[0]}")
            used[name] = match
    require_plain(edit, model, used)
    names = [(name, name) for name in model.entries if name not in used]
    check_names([*names, *((match.old[0], new) for match in matches for new in match.new)], used)
    made = _made(model, matches, make)
    firsts = {match.old[0]: match for match in matches}
    entries: dict[str, Entry] = {}
    for name, entry in model.entries.items():
        if name in firsts:
            entries |= made[firsts[name]]
        elif name not in used:
            entries[name] = entry
    touched = {path for name in (*used, *entries.keys() - model.entries.keys()) for path in ancestors(parent_of(name))}
    result = of_entries(entries, lambda path: _known(model, path, path in touched))
    changes = _changes(edit, model, matches, made)
    return Applied(result, changes, [*notes, *_tie_notes(model, used)], context.inputs)


def _made(model: StateDictModel, matches: Sequence[Match], make: Make) -> dict[Match, dict[str, StateDictTensor]]:
    """Return the new tensors of each match by their names."""
    found: dict[Match, dict[str, StateDictTensor]] = {}
    before: dict[tuple[int, ...], list[StateDictTensor]] = {}
    identity = model.next_identity
    for match in matches:
        old = [model.tensors[name] for name in match.old]
        key = tuple(tensor.identity for tensor in old)
        results = make(match, [seen_through(tensor) for tensor in old])
        at = place_of(match.old[0], old[0])
        places = [at]
        if len(results) > 1:
            places = [at._replace(numbers=(*at.numbers, number)) for number in range(len(results))]
        if key not in before:
            numbers = range(identity, identity + len(results))
            before[key] = [
                made_of(result.parts, result.dim, number, place, result.shape)
                for result, number, place in zip(results, numbers, places, strict=True)
            ]
            identity += len(results)
        new = [tied_at(tensor, place) for tensor, place in zip(before[key], places, strict=True)]
        found[match] = dict(zip(match.new, new, strict=True))
    return found


def _known(model: StateDictModel, path: str, is_touched: bool) -> StateDictModule:
    """Return what is still known about a module: nothing of its class, if its tensors or those below it are others."""
    old = model.modules.get(path)
    if old is None:
        return StateDictModule(None)
    return StateDictModule(None, old.version) if is_touched and old.info is not None else old


def _tie_notes(model: StateDictModel, used: Collection[str]) -> list[str]:
    """Return notes on names of tied tensors that an edit does not take."""
    found = []
    for names in names_of_one(model.blueprint):
        left = [name for name in names if name not in used]
        if left and len(left) < len(names):
            taken = next(name for name in names if name in used)
            found.append(f"{taken} was tied to {listed(left, 3)}, which stays as it was")
    return found if len(found) <= 3 else [*found[:3], f"{counted(len(found) - 3, 'more tensor')} had such ties"]


def _changes(
    edit: Edit, model: StateDictModel, matches: Sequence[Match], made: dict[Match, dict[str, StateDictTensor]]
) -> list[Change]:
    """Return a change for each match, or one for all of many."""
    found = []
    for match in matches:
        old, new = [model.tensors[name] for name in match.old], made[match]
        first, *others = match.old
        before = f"{list(old[0].shape or ())}" + (f" and {listed(others, _LISTED)}" if others else "")
        after = f"{list(new[first].shape or ())}" if match.new == match.old else _told(new)
        found.append(Change(first, edit.name, before, after, _parameters(old), _parameters(new.values())))
    if len(found) > _ROWS:
        every_old = [name for match in matches for name in match.old]
        every_new = [tensor for tensors in made.values() for tensor in tensors.values()]
        before, after = counted(len(every_old), "key"), counted(len(every_new), "key")
        size, now = _parameters(map(model.tensors.__getitem__, every_old)), _parameters(every_new)
        found = [Change("", edit.name, before, after, size, now)]
    return [replace(found[0], resolved=(str(edit),)), *found[1:]]


def _told(tensors: dict[str, StateDictTensor]) -> str:
    """Return new tensors in short: their names and, once where they are the same, their shapes."""
    shapes = {tensor.shape for tensor in tensors.values()}
    if len(shapes) == 1:
        return f"{listed(list(tensors), _LISTED)} {list(shapes.pop() or ())}"
    return listed([f"{name} {list(tensor.shape or ())}" for name, tensor in tensors.items()], _LISTED)


def _parameters(tensors: Iterable[StateDictTensor]) -> int:
    distinct = {tensor.identity: tensor for tensor in tensors}
    return sum(tensor.elements for tensor in distinct.values() if tensor.kind == "parameter")


def needs_keys(edit: Edit, kind: str) -> RequestError:
    """Return the error for a model whose class is known: its forward pass takes its tensors as they are.

    Args:
        edit: the edit.
        kind: the name of the class.
    """
    return RequestError(
        f"{edit.name} changes the keys of a state dict, and {kind} takes its tensors as they are",
        "--bare-keys ignores the record of a file and edits its keys; name a file without a record with -m alone, "
        "without --arch",
    )
