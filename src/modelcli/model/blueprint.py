"""A blueprint: what a model is made of, as plain data, without torch and without a single weight.

Everything that is shown is shown from a blueprint. Paths are PyTorch's: the root is `""` here and `.` on a screen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from modelcli.model.paths import ancestors, parent_of
from modelcli.model.tensors import Shape, TensorInfo, value_class
from modelcli.model.totals import Totals, _counted_once, _Sum, totals_of

#: Whether what a module holds is trained; None where nothing says, and where there is nothing to train.
Trainable = bool | Literal["partial"] | None


@value_class
class ModuleInfo:
    """One module at one path. `type` is None where nothing is known but key names.

    `absent` are the children that are None, by position and name: they are printed and are nothing else.
    `bases` are the names of its classes from its own up to, not including, `Module`; `config` is its `extra_repr()`;
    `own_repr` is set where its class prints itself in its own way; `shared_with` is the first path of the same
    module.
    """

    path: str
    type: str | None
    bases: tuple[str, ...] = ()
    config: str = ""
    shared_with: str | None = None
    own_repr: str | None = None
    absent: tuple[tuple[int, str], ...] = ()

    @property
    def depth(self) -> int:
        return self.path.count(".") + 1 if self.path else 0

    @property
    def is_sequence(self) -> bool:
        return "Sequential" in self.bases or "ModuleList" in self.bases


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What a forward pass showed of one module.

    `output_shape` is a list of ints for a tensor, a list or dict of those for an output of several, None for none.
    `macs` counts the multiply-accumulates of the module and all below it; None for a further place of a shared module,
    whose calls are counted at another.
    """

    output_shape: Any
    macs: int | None


@dataclass(frozen=True)
class Trace:
    """A forward pass. Modules that are not in `layers` were not called, but for those in `unseen`: they lie inside a
    scripted module that ran, and nothing tells whether they did.

    `reason` is None where the pass ran to its end, else the one line that says why it did not; the rows that ran
    are there all the same, and the totals are None. `device` is where it was made: `meta`, `cpu`, or `fake` for fake
    tensors; None where none was made. `notes` say what there is to tell of that. `uncounted` names the operators that
    multiply and that nothing is known of: with one of them `macs` is a lower bound.
    """

    inputs: tuple[Shape, ...] | None
    layers: Mapping[str, LayerTrace] = field(default_factory=dict)
    macs: int | None = None
    input_bytes: int | None = None
    forward_backward_bytes: int | None = None
    reason: str | None = None
    device: str | None = "meta"
    notes: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blueprint:
    """A model as plain data: its modules and tensors in PyTorch's order, and a forward pass where one was made."""

    modules: tuple[ModuleInfo, ...]
    tensors: tuple[TensorInfo, ...]
    trace: Trace | None = None

    @property
    def root(self) -> ModuleInfo:
        return self.modules[0]

    @cached_property
    def by_path(self) -> Mapping[str, ModuleInfo]:
        return {module.path: module for module in self.modules}

    @cached_property
    def by_name(self) -> Mapping[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def children(self) -> Mapping[str, tuple[ModuleInfo, ...]]:
        """The direct children of each module, in order."""
        found: dict[str, list[ModuleInfo]] = defaultdict(list)
        for module in self.modules[1:]:
            found[parent_of(module.path)].append(module)
        return {path: tuple(kids) for path, kids in found.items()}

    @cached_property
    def _below(self) -> Mapping[str, _Sum]:
        """The parameters at and below each module, summed up from the leaves to the root."""
        sums = {module.path: _Sum() for module in self.modules}
        for path, tensor, times in _counted_once(self.tensors):
            holder = path if path in sums else next(above for above in ancestors(path) if above in sums)
            sums[holder].add(tensor, times)
        # Each module stands behind the one that holds it.
        for path in reversed(sums):
            if path and (above := sums.get(parent_of(path))) is not None:
                above.merge(sums[path])
        return sums

    def params_of(self, path: str) -> int:
        """`sum(p.numel() for p in module.parameters())` of the module at this path."""
        return self._below.get(path, _Sum()).elements

    def trainable_of(self, path: str) -> Trainable:
        """Whether the parameters at and below this path are trained, all of them or a part.

        None where the flag of one is unknown and the others do not say it already, and where there are no parameters.
        """
        below = self._below.get(path, _Sum())
        if below.trained and below.frozen:
            return "partial"
        if below.unknown or not (below.trained or below.frozen):
            return None
        return below.trained > 0

    @cached_property
    def totals(self) -> Totals:
        return totals_of(self.tensors)

    def with_trace(self, trace: Trace) -> Blueprint:
        return replace(self, trace=trace)


def from_keys(
    tensors: Iterable[TensorInfo],
    types: Mapping[str, str] | None = None,
    pay: Callable[[int], None] = lambda _characters: None,
) -> Blueprint:
    """The blueprint of a bare checkpoint: a tree of its key names, and of `types`, class names by path, if any.

    A name of 4,000 characters can tell of 2,000 modules: `pay` is told the length of each path before it is made, and
    raises where they are too many.
    """
    listed, types = tuple(tensors), types or {}
    children = _tree_of(chain(types, (parent_of(tensor.name) for tensor in listed)), pay)
    named = ((path, types.get(path)) for path in _depth_first(children))
    modules = (ModuleInfo(path, kind, () if kind is None else (kind,)) for path, kind in named)
    return Blueprint(tuple(modules), listed)


def _tree_of(paths: Iterable[str], pay: Callable[[int], None]) -> Mapping[str, list[str]]:
    """The children of each of these paths and of all that lie above them, siblings in their first order."""
    children: dict[str, list[str]] = {"": []}
    for path in paths:
        below: list[str] = []
        while path not in children:
            pay(len(path))
            children[path] = below
            path, below = parent_of(path), [path]
        children[path] += below
    return children


def _depth_first(children: Mapping[str, list[str]]) -> Iterator[str]:
    """Parents before children, each subtree whole."""
    stack = [""]
    while stack:
        path = stack.pop()
        yield path
        stack += reversed(children[path])
