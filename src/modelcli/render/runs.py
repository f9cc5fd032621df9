"""Runs: consecutive numbered siblings whose subtrees look the same, shown as one row, `encoder.layers.[0-11]`.

This module computes them from a blueprint. It does not recurse, so a deep model cannot exhaust Python's stack.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.paths import ancestors, joined, parent_of, shown
from modelcli.render import folding


@dataclass(frozen=True)
class Run:
    """The modules that one row stands for.

    Attributes:
        path: a selector that picks all of them: `encoder.layers.[0-11]`.
        name: the last component of `path`.
        paths: the path of each module.
        depth: how deep they lie in the model; the model itself has depth 0.
    """

    path: str
    name: str
    paths: tuple[str, ...]
    depth: int

    @property
    def first(self) -> str:
        """The path of the first module."""
        return self.paths[0]

    def counted(self, type_name: str | None) -> str | None:
        """Return `12 x EncoderBlock`, or `12 x -` if the class is not known, or the class alone for a single module."""
        return type_name if len(self.paths) == 1 else f"{len(self.paths)} x {type_name or '-'}"


class Runs:
    """The runs of a model: siblings fold into one row if their rows, and all rows below them, would be equal.

    Args:
        blueprint: the model.
        traced: compare what a summary shows (type, output shape, parameters, trainable, mult-adds); otherwise what a
            tree shows (type, configuration, parameters).

    Modules with shared modules or tied parameters only fold if these are shared or tied to the same ones.
    """

    def __init__(self, blueprint: Blueprint, *, traced: bool) -> None:
        self._blueprint = blueprint
        self._kinds = _kinds(blueprint, traced=traced)

    def below(self, top: str = "", depth: int | None = None) -> Iterator[Run]:
        """Iterate over the module at `top` and those below it, down to a depth: each run once, in the model's order."""
        stack = [Run(shown(top), shown(top), (top,), self._blueprint.by_path[top].depth)]
        while stack:
            run = stack.pop()
            yield run
            if depth is None or run.depth < depth:
                stack += reversed(self.children(run))

    def children(self, run: Run) -> list[Run]:
        """Return the runs among the children of a run's modules, all of which have the same children as the first."""
        groups: list[list[ModuleInfo]] = []
        for child in self._blueprint.children.get(run.first, ()):
            if groups and self._goes_on(groups[-1][-1], child):
                groups[-1].append(child)
            else:
                groups.append([child])
        return [self._child(run, [_own_name(module) for module in group]) for group in groups]

    def _child(self, parent: Run, names: Sequence[str]) -> Run:
        name = folding.range_of(names)
        above = "" if parent.paths == ("",) else parent.path
        paths = tuple(joined(path, each) for path in parent.paths for each in names)
        return Run(joined(above, name), name, paths, parent.depth + 1)

    def _goes_on(self, module: ModuleInfo, following: ModuleInfo) -> bool:
        """Whether a sibling continues a run: it looks the same as the last module, and has the next number."""
        if self._kinds[module.path] != self._kinds[following.path]:
            return False
        return folding.counts_on(_own_name(module), _own_name(following))

    def params_of(self, run: Run) -> int:
        """Return the number of parameter elements at and below the modules of a run; tied parameters count once."""
        total = sum(map(self._blueprint.params_of, run.paths))
        if len(run.paths) > 1:
            seen: set[str] = set()
            for path in run.paths:
                for identity, elements in self._tied_below.get(path, {}).items():
                    total -= elements if identity in seen else 0
                    seen.add(identity)
        return total

    @cached_property
    def _tied_below(self) -> dict[str, dict[str, int]]:
        """For each module that has tied parameters at or below it: their identities, with their numbers of elements."""
        tied = {tensor.tied_to for tensor in self._blueprint.tensors if tensor.tied_to is not None}
        below: dict[str, dict[str, int]] = defaultdict(dict)
        for tensor in self._blueprint.tensors:
            if tensor.kind == "parameter" and tensor.identity in tied:
                for path in ancestors(parent_of(tensor.name)):
                    below[path][tensor.identity] = tensor.elements
        return below


def _own_name(module: ModuleInfo) -> str:
    return module.path.rpartition(".")[2]


def _kinds(blueprint: Blueprint, *, traced: bool) -> dict[str, int]:
    """Return a number for each module path: equal for modules whose rows, and all rows below them, look the same."""
    holders = blueprint.by_path
    tied: dict[str, list[tuple[str, str]]] = defaultdict(list)
    firsts = {tensor.tied_to for tensor in blueprint.tensors if tensor.tied_to is not None}
    for tensor in blueprint.tensors:
        if tensor.tied_to is not None or tensor.name in firsts:
            holder = next(path for path in ancestors(parent_of(tensor.name)) if path in holders)
            tied[holder].append((tensor.name[len(holder) :], tensor.identity))
    shared = {module.shared_with for module in blueprint.modules if module.shared_with is not None}
    shown_of = _summary_cells if traced else _tree_cells
    numbers: dict[Any, int] = {}
    kinds: dict[str, int] = {}
    for module in reversed(blueprint.modules):  # children come after their parents
        path = module.path
        looks = (
            module.type,
            blueprint.params_of(path),
            shown_of(blueprint, module),
            module.shared_with if path not in shared else path,
            tuple(tied[path]),
            tuple((_own_name(child), kinds[child.path]) for child in blueprint.children.get(path, ())),
        )
        kinds[path] = numbers.setdefault(looks, len(numbers))
    return kinds


def _summary_cells(blueprint: Blueprint, module: ModuleInfo) -> tuple[object, ...]:
    """Return what a row of a summary shows besides the module's name, type and parameters."""
    layers = blueprint.trace.layers if blueprint.trace is not None else {}
    ran = layers.get(module.path)
    return blueprint.trainable_of(module.path), None if ran is None else (repr(ran.output_shape), ran.macs)


def _tree_cells(_blueprint: Blueprint, module: ModuleInfo) -> tuple[object, ...]:
    """Return what a line of a tree shows besides the module's name, type and parameters."""
    return (module.config,)
