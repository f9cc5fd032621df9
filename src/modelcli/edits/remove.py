"""remove: remove modules from a model."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.picking import are_numbers, parts_below
from modelcli.edits.placing import renumber_option
from modelcli.edits.targets import OfTargets
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import joined, parent_of, shown
from modelcli.model.state_dict import StateDictModel, assembled, split_key
from modelcli.model.tensors import TensorInfo


@dataclass(frozen=True, kw_only=True)
class Remove(OfTargets):
    """Remove modules; in a sequence whose children are `0..n-1`, later children move down.

    `renumber` treats the numbered children in a state dict of unknown architecture as such a sequence.
    """

    renumber: bool = renumber_option()

    name: ClassVar[str] = "remove"
    summary: ClassVar[str] = "Remove modules; in a Sequential or ModuleList, later children move down."
    effect: ClassVar[str] = (
        "removes modules; in a `Sequential` or `ModuleList` with children `0` to `n-1`, later children move down"
    )
    in_pytorch: ClassVar[str] = "`.pop(6)`, `del`"
    example: ClassVar[str] = "classifier.6"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli remove '**:Dropout' -m squeezenet1_1 -o out.pth",
        "modelcli remove classifier.6 -m alexnet",
    )
    also_called: ClassVar[tuple[str, ...]] = ("rm", "delete", "del", "drop", "pop")
    handler: ClassVar[str] = "modelcli.live.surgery.remove"
    moves_paths: ClassVar[bool] = True

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        described = model.blueprint
        known = described.by_name
        others = [TensorInfo(name, (0,), "uint8", "buffer") for name in model.keys if name not in known]
        blueprint = replace(described, tensors=(*described.tensors, *others)) if others else described
        paths, names = picked_to_remove(self, blueprint, root_type=described.root.type)
        below = parts_below(model, paths)
        changes = [Change(path, self.name, below[path].brief, "", below[path].params, 0) for path in paths]
        for name in names:
            info = blueprint.by_name[name]
            size = info.elements if info.kind == "parameter" else 0
            changes.append(Change(name, self.name, "1 tensor" if name in known else "1 entry", "", size, 0))
        taking = _Taking(model, renumber=self.renumber)
        notes = taking.take_modules(paths) + taking.take_entries(names)
        left = taking.result(prune=described.root.type is None)
        if described.root.type is None and not left.blueprint.tensors:
            raise RequestError(f"remove {', '.join(self.targets)} would leave no tensor")
        line = str(Remove(targets=tuple(map(selectors.literal, [*paths, *names])), renumber=self.renumber))
        changes[0] = replace(changes[0], resolved=(line,))
        return Applied(left, changes, notes, context.inputs)


def picked_to_remove(edit: Remove, blueprint: Blueprint, *, root_type: str | None) -> tuple[list[str], list[str]]:
    """Return the modules that the targets name, and the tensors of targets that name no module."""
    of_modules, of_tensors = [], []
    for target in edit.targets:
        selector = selectors.parse(target)
        if selectors.matched_modules(selector, blueprint):
            of_modules.append(target)
        elif selectors.matched_tensors(selector, blueprint):
            of_tensors.append(target)
        else:
            raise selectors.no_match(selector, blueprint)
    if of_tensors and root_type is not None:
        raise RequestError(
            f"{of_tensors[0]} is a tensor of {root_type}, but remove takes only modules",
            "replace its module with one that has no such tensor: 'Linear(_,_,bias=False)'",
        )
    paths, names = [], []
    without = edit.without
    if of_modules:
        paths = selectors.select_modules(blueprint, of_modules, without=() if of_tensors else without)
    if of_tensors:
        names = selectors.select_tensors(blueprint, of_tensors)
        taken = {name for target in without for name in selectors.select_tensors(blueprint, [target])}
        excluded = {
            path for target in without for path in selectors.matched_modules(selectors.parse(target), blueprint)
        }
        names = [name for name in names if name not in taken]
        paths = [path for path in paths if path not in excluded]
        if not names and not paths:
            raise RequestError("--except leaves out everything that was selected")
    if "" in paths:
        raise RequestError("the model itself cannot be removed", "extract PATH makes a part of it the model")
    selectors.refuse_nested([*paths, *names], "to remove the outer one destroys the inner")
    selectors.require_expected(edit.expect, [*paths, *names])
    return paths, names


class _Taking:
    """Removes modules and entries from a state-dict model; with `renumber`, later ones move down."""

    def __init__(self, model: StateDictModel, *, renumber: bool) -> None:
        self.model = model
        self.renumber = renumber
        self.gone_modules: set[str] = set()
        self.gone_entries: set[str] = set()
        #: The new names of children and of own entries, by the path of what holds them, where they get others.
        self.children: dict[str, dict[str, str]] = {}
        self.entries: dict[str, dict[str, str]] = {}

    def take_modules(self, paths: Iterable[str]) -> list[str]:
        """Remove modules, and return notes."""
        holders: dict[str, list[str]] = {}
        for path in paths:
            holders.setdefault(parent_of(path), []).append(path.rpartition(".")[2])
        notes = []
        for above, gone in holders.items():
            if self._take_children(above, set(gone)):
                notes.append(_keep_their_numbers("children", above))
        return notes

    def _take_children(self, above: str, gone: set[str]) -> bool:
        """Whether numbered children keep their numbers only because the file does not record what they are."""
        names = [path.rpartition(".")[2] for path in self.model.children[above]]
        self.gone_modules |= {joined(above, name) for name in gone}
        left = [name for name in names if name not in gone]
        numbers = are_numbers(names)
        info = self.model.modules[above].info
        if info is not None:
            if info.is_sequence and names == [str(number) for number in range(len(names))]:
                self.children[above] = {name: str(number) for number, name in enumerate(left)}
            return False
        if numbers and self.renumber:
            ordered = sorted(map(int, gone))
            self.children[above] = {name: str(_moved_down(int(name), ordered)) for name in left}
        if self.renumber and not numbers:
            raise RequestError(
                "--renumber is for children called 0, 1, 2, but some here have other names", "leave it out"
            )
        return numbers and not self.renumber and any(int(name) > min(map(int, gone)) for name in left)

    def take_entries(self, names: Iterable[str]) -> list[str]:
        """Remove entries, and return notes."""
        holders: dict[str, list[str]] = {}
        for name in names:
            if name not in self.model.entries:
                raise RequestError(f"{name} is a part of an entry, but remove takes only whole entries")
            above, own = split_key(name)
            if (info := self.model.modules[above].info) is not None:
                raise RequestError(
                    f"{name} is a tensor of {info.type}, but remove takes only modules",
                    "replace its module with one that has no such tensor: 'Linear(_,_,bias=False)'",
                )
            holders.setdefault(above, []).append(own)
        return [note for above, gone in holders.items() for note in self._take_own(above, gone)]

    def _take_own(self, above: str, gone: list[str]) -> list[str]:
        numbers = are_numbers(gone)
        if self.renumber and not numbers:
            named = next(name for name in gone if not are_numbers([name]))
            raise RequestError(
                f"--renumber is for what is called 0, 1, 2, but {joined(above, named)} has another name",
                "leave it out",
            )
        taken = set(gone)
        self.gone_entries |= {joined(above, name) for name in gone}
        entries = [own for name in self.model.own_entries[above] if (own := split_key(name)[1]) not in taken]
        moved = self.children.get(above, {})
        kept = [path for path in self.model.children[above] if path not in self.gone_modules]
        children = [(own, moved.get(own, own)) for own in (path.rpartition(".")[2] for path in kept)]
        there = [int(name) for name in (*entries, *(now for _, now in children)) if are_numbers([name])]
        if not numbers or not any(number > min(map(int, gone)) for number in there):
            return []
        if not self.renumber:
            return [_keep_their_numbers("tensors", above)]
        ordered = sorted(map(int, gone))

        def down(name: str) -> str:
            return str(_moved_down(int(name), ordered)) if are_numbers([name]) else name

        self.entries[above] = {name: down(name) for name in entries}
        self.children[above] = {own: down(now) for own, now in children}
        return []

    def result(self, *, prune: bool) -> StateDictModel:
        """The model that is left; with `prune` without modules of unknown type that hold nothing any more."""
        model = self.model
        now: dict[str, str] = {}
        for path in model.modules:
            above, _, own = path.rpartition(".")
            if path in self.gone_modules or (path and above not in now):
                continue
            now[path] = joined(now[above], self.children.get(above, {}).get(own, own)) if path else ""
        entries = {path: [name for name in model.own_entries[path] if name not in self.gone_entries] for path in now}
        if prune:
            needed = {""}
            for path in reversed(now):
                if path in needed or entries[path] or model.modules[path].info is not None:
                    needed.update((path, path.rpartition(".")[0]))
            now = {path: new for path, new in now.items() if path in needed}
        return assembled(
            (
                new,
                model.modules[path],
                (
                    (self.entries.get(path, {}).get(own, own), model.entries[name])
                    for name in entries[path]
                    for own in (split_key(name)[1],)
                ),
            )
            for path, new in now.items()
        )


def _moved_down(number: int, gone: Sequence[int]) -> int:
    """Return the new number after smaller ones have been removed; `gone` is sorted."""
    return number - bisect.bisect_left(gone, number)


def _keep_their_numbers(what: str, path: str) -> str:
    return (
        f"the later {what} of {shown(path)} keep their numbers, because the file does not record "
        "that they are a Sequential; "
        "--renumber moves them down"
    )
