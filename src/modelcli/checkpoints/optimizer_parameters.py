"""Find out which parameter of a model each id in an optimizer's state dict stands for.

The ids of `torch.optim` are positions in the list of parameters that the optimizer got, so a file says nothing of
names. What is accepted, in this order:

1. Names: ids that are names, or `param_names`.
2. The model has as many parameters as there are ids, and they are taken in the model's order; or as many that are not
   known to be frozen, or as many that are known to be trained.
3. There are as many, and no shape occurs in two groups: each group has the parameters with its shapes, in the model's
   order. Groups with and without weight decay are such.
4. There are fewer ids than parameters, and only one choice among the parameters, in the model's order, has their
   shapes. An optimizer of the layers that are trained is such.

In all cases the shapes of the state have to fit: `exp_avg` and its like have the shape of their parameter. Where
nothing of this holds, the parameters are not known, which is said and never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from modelcli.checkpoints.optimizers import Optimizer, shapes_in
from modelcli.model import wrapper_prefixes
from modelcli.model.parameter_origins import Held
from modelcli.model.paths import parent_of
from modelcli.model.tensors import Shape
from modelcli.wording import counted, listed


@dataclass(frozen=True)
class Known:
    """The parameters of an optimizer.

    Attributes:
        groups: the names that the parameters of each group have in the model.
        written: returns the name of a parameter as the optimizer has it.
        is_assumed: whether several groups were taken in the model's order and nothing else speaks for that.
    """

    groups: list[list[str]]
    written: Callable[[str], str] = str
    is_assumed: bool = False


def identified(optimizer: Optimizer, opened: Mapping[str, Held], *, from_keys: bool) -> Known | str:
    """Return the parameters of an optimizer without a fault, or why they are not known.

    Args:
        optimizer: the optimizer.
        opened: the parameters of the model as it is in the file, in order.
        from_keys: whether their order is that of the keys in the file, because the architecture is not known.
    """
    if (names := optimizer.names) is not None:
        found = _by_name(names, opened)
        if isinstance(found, Known) and (misfit := _misfit(optimizer, found.groups, opened)):
            return misfit
        return found
    count = sum(map(len, optimizer.ids))
    if from_keys and is_sorted(list(opened)):
        return "the keys of the file are in alphabetical order, not in the order of model.parameters()"
    misfits: list[str] = []
    candidates = [
        list(opened),
        [name for name, held in opened.items() if held.requires_grad is not False],
        [name for name, held in opened.items() if held.requires_grad],
    ]
    for names_in_order in candidates:
        if len(names_in_order) != count:
            continue
        groups = _cut(names_in_order, optimizer)
        by_shape = _by_shapes_of_groups(optimizer, names_in_order, opened)
        if not (misfit := _misfit(optimizer, groups, opened)):
            several = sum(1 for group in groups if group) > 1
            return Known(groups, is_assumed=several and by_shape != groups)
        if by_shape is not None:
            return Known(by_shape)
        misfits.append(misfit)
    if misfits:
        return misfits[0]
    if count < len(opened) and (only := _only_choice(optimizer, opened)) is not None:
        return Known(_cut(only, optimizer))
    which = ", and which of these is not known" if count < len(opened) else ""
    return f"it has {counted(count, 'parameter')}, the model has {len(opened):,}{which}"


def _cut(names: Sequence[str], optimizer: Optimizer) -> list[list[str]]:
    """Return the names in as many lists, of the same lengths, as the optimizer has groups."""
    rest = iter(names)
    return [[next(rest) for _ in ids] for ids in optimizer.ids]


# --- names -----------------------------------------------------------------------------------------------------------


def _by_name(names: Sequence[Sequence[str]], opened: Mapping[str, Held]) -> Known | str:
    flat = [name for group in names for name in group]
    keys = {name: held.shape for name, held in opened.items()}
    wrapped = wrapper_prefixes.fit(dict.fromkeys(flat), keys)
    bare = {wrapper_prefixes.fit(keys, dict.fromkeys(flat)).key(name): name for name in opened}
    readings: list[tuple[Callable[[str], str], Callable[[str], str]]] = [
        (str, str),
        (wrapped.key, (lambda name: wrapped.prefix + name) if not wrapped.markers else str),
        (lambda name: bare.get(name, name), wrapper_prefixes.fit(keys, dict.fromkeys(flat)).key),
    ]
    for read, written in readings:
        found = [[read(name) for name in group] for group in names]
        of_model = [name for group in found for name in group]
        if all(name in opened for name in of_model) and len(set(of_model)) == len(of_model):
            return Known(found, written)
    unknown = [name for name in flat if name not in opened]
    return f"{listed(unknown, 3)} in it {'is' if len(unknown) == 1 else 'are'} no parameter of the model"


# --- shapes ----------------------------------------------------------------------------------------------------------


def _misfit(optimizer: Optimizer, groups: Sequence[Sequence[str]], opened: Mapping[str, Held]) -> str:
    """Return which state cannot be that of its parameter, by its shapes; empty if all can be."""
    joint = joint_shape(groups, opened)
    for ids, names in zip(optimizer.ids, groups, strict=True):
        for own, name in zip(ids, names, strict=True):
            shapes = shapes_in(optimizer.state.get(own))
            if shapes and not _fits(opened[name].shape, optimizer.state[own]) and shapes != {joint}:
                return f"it has state of the shape {list(min(shapes))} where {name} {list(opened[name].shape or ())} is"
    return ""


def joint_shape(groups: Sequence[Sequence[str]], opened: Mapping[str, Held]) -> Shape:
    """Return the shape of a vector of all parameters, which LBFGS has as the state of the first one."""
    return (sum(prod(opened[name].shape or ()) for names in groups for name in names),)


def _fits(shape: Shape | None, entry: Mapping[Any, Any]) -> bool:
    """Whether a parameter of a shape may have this state: tensors of its own shape, besides which there may be others.

    Adafactor has averages of its rows and columns instead, which have its shape but for one axis.
    """
    if shape is None:
        return True
    halves = {key: value for key, value in entry.items() if "row" in str(key) or "col" in str(key)}
    others = {key: value for key, value in entry.items() if key not in halves}
    if found := shapes_in(others):
        return shape in found
    return shapes_in(halves) <= set(_reduced(shape))


def _reduced(shape: Shape) -> Iterator[Shape]:
    for axis in range(len(shape)):
        yield (*shape[:axis], *shape[axis + 1 :])
        yield (*shape[:axis], 1, *shape[axis + 1 :])


def _by_shapes_of_groups(
    optimizer: Optimizer, names: Sequence[str], opened: Mapping[str, Held]
) -> list[list[str]] | None:
    """Return the parameters of each group, if no shape occurs in two groups and all fit; else None."""
    group_of: dict[Shape, int] = {}
    shapes: list[list[Shape]] = []
    for number, ids in enumerate(optimizer.ids):
        shapes.append([])
        for own in ids:
            found = shapes_in(optimizer.state.get(own))
            if len(found) != 1 or group_of.setdefault(min(found), number) != number:
                return None
            shapes[-1].append(min(found))
    groups: list[list[str]] = [[] for _ in shapes]
    for name in names:
        shape = opened[name].shape
        if shape is None or shape not in group_of:
            return None
        groups[group_of[shape]].append(name)
    fit = all([opened[name].shape for name in group] == own for group, own in zip(groups, shapes, strict=True))
    return groups if fit else None


def _only_choice(optimizer: Optimizer, opened: Mapping[str, Held]) -> list[str] | None:
    """Return the parameters of an optimizer of some, if only one choice of them, in order, has the shapes; else None.

    The first choice from the front and the first from the back are the same only if there is no other.
    """
    entries = [shapes_in(optimizer.state.get(own)) for ids in optimizer.ids for own in ids]
    if not all(entries):
        return None
    front = _first_choice(entries, list(opened.items()))
    back = _first_choice(entries[::-1], list(opened.items())[::-1])
    return front if front is not None and back is not None and front == back[::-1] else None


def _first_choice(entries: Sequence[set[Shape]], parameters: Sequence[tuple[str, Held]]) -> list[str] | None:
    found: list[str] = []
    for name, held in parameters:
        if len(found) < len(entries) and held.shape in entries[len(found)]:
            found.append(name)
    return found if len(found) == len(entries) else None


# --- order -----------------------------------------------------------------------------------------------------------


def is_sorted(names: list[str]) -> bool:
    """Whether names are in an alphabetical order that no module has: a bias before its weight, or 10 before 2."""
    if names != sorted(names):
        return False
    seen: set[str] = set()
    numbers: dict[str, int] = {}
    for name in names:
        if name.rpartition(".")[2] == "weight" and f"{parent_of(name)}.bias".removeprefix(".") in seen:
            return True
        seen.add(name)
        path = ""
        for part in name.split(".")[:-1]:
            if part.isdecimal() and len(part) < 10:
                if int(part) < numbers.get(path, 0):
                    return True
                numbers[path] = int(part)
            path += f"{part}."
    return False


__all__ = ["Known", "identified", "is_sorted", "joint_shape"]
