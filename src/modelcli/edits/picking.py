"""Group what an edit picks into rows to show, and make notes on ties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import ancestors, parent_of
from modelcli.model.state_dict import StateDictModel
from modelcli.model.tensors import TensorInfo
from modelcli.wording import counted, listed


def groups_of(targets: Sequence[str], blueprint: Blueprint, chosen: Collection[str]) -> list[tuple[str, list[str]]]:
    """Group the chosen tensors by the outermost module or tensor that a target names, one row for each."""
    tops: dict[str, list[str]] = {}
    named: set[str] = set()
    for target in targets:
        named |= selectors.matched_modules(selectors.parse(target), blueprint)
    chosen = chosen if isinstance(chosen, set | frozenset) else set(chosen)
    outermost = selectors.outermost_of_tensors(named, blueprint)
    for name in blueprint.by_name:
        if name in chosen:
            tops.setdefault(outermost.get(name, name) if name else name, []).append(name)
    return list(tops.items())


def count_at(names: Iterable[str]) -> Mapping[str, int]:
    """Count how many of these tensors are at or below each path."""
    level = Counter(names)
    found: Counter[str] = Counter()
    while level:
        found.update(level)
        above: Counter[str] = Counter()
        for path, number in level.items():
            if path:
                above[path.rpartition(".")[0]] += number
        level = above
    return found


def tie_notes(groups: Iterable[Sequence[str]], names: Collection[str], done: str) -> list[str]:
    """Return notes if an edit of some tensors also changes other names, because they are tied.

    `groups` are the names of tensors that are one for this edit, `names` those that were picked, and `done` is what
    became of them: `frozen`.
    """
    notes, names = [], frozenset(names)
    for group in groups:
        picked = [name for name in group if name in names]
        others = [name for name in group if name not in names]
        if picked and others:
            notes.append(f"{picked[0]} is tied to {', '.join(others)}, so that is {done} too")
    return (
        notes
        if len(notes) <= 3
        else [*notes[:3], f"{len(notes) - 3} more tensors are tied to others, which are {done} too"]
    )


def dense_notes(names: Iterable[str], dense: Collection[str]) -> list[str]:
    """The note that tells which of the picked tensors an edit leaves as they are: sparse, quantized and lazy ones.

    Args:
        names: those that were picked.
        dense: the names of all tensors of the model that the edit can change.
    """
    left = [name for name in names if name not in dense]
    if not left:
        return []
    stay = "stays as it is: it is" if len(left) == 1 else "stay as they are: each is"
    return [f"{listed(left, 3)} {stay} no dense tensor"]


def names_of_one(blueprint: Blueprint) -> list[list[str]]:
    """Return the names of each tensor that has several. Views count as separate tensors."""
    tied = {tensor.tied_to for tensor in blueprint.tensors if tensor.tied_to is not None}
    names: dict[str, list[str]] = {}
    for tensor in blueprint.tensors if tied else ():
        if tensor.identity in tied:
            names.setdefault(tensor.identity, []).append(tensor.name)
    return list(names.values())


@dataclass
class Part:
    """What lies at and below a module: its short form, and the elements of its parameters."""

    brief: str = ""
    params: int = 0


#: So many starts of names are compared faster than a name is taken apart.
_FEW = 16


def parts_below(model: StateDictModel, paths: Collection[str]) -> dict[str, Part]:
    """What each of these modules comes to; none of them lies in another one, but for the root."""
    wanted = set(paths)
    tensors: dict[str, dict[str, TensorInfo]] = {path: {} for path in paths}
    # Of 100,000 tensors hardly one lies below a few modules, which the start of its name tells at once.
    starts = tuple(f"{path}." for path in wanted) if len(wanted) <= _FEW and "" not in wanted else ("",)
    for info in model.blueprint.tensors:
        if not info.name.startswith(starts):
            continue
        for path in ancestors(parent_of(info.name)):
            if path in wanted:
                tensors[path].setdefault(info.identity, info)
    found = {}
    for path, own in tensors.items():
        params = sum(info.elements for info in own.values() if info.kind == "parameter")
        module = model.modules[path]
        found[path] = Part(counted(len(own), "tensor") if module.brief is None else module.brief, params)
    return found


def are_numbers(names: Iterable[str]) -> bool:
    """Whether names are numbers as PyTorch calls children, none of them twice in another spelling (`1`, `01`)."""
    return all(name.isascii() and name.isdigit() and len(name) < 10 and str(int(name)) == name for name in names)


class PartlyPicked(NamedTuple):
    """A shared module that is picked under some of its names only.

    Attributes:
        others: the paths that are not picked.
        message: what an error says of it.
        also: the words that name the other paths: `--also again`.
    """

    others: list[str]
    message: str
    also: list[str]


def partly_picked(paths: Sequence[str], everywhere: Sequence[str]) -> PartlyPicked | None:
    """Return what there is to say of a module whose paths are `everywhere`; None if `paths` has all of them."""
    others = [path for path in everywhere if path not in paths]
    if not others:
        return None
    message = (
        f"{paths[0]} is one module with {len(everywhere)} names ({', '.join(everywhere)}); the selector names "
        f"{len(paths)} of them"
    )
    return PartlyPicked(others, message, [word for path in others for word in ("--also", selectors.literal(path))])
