"""Turn a blueprint into the compact data from which the script of a page builds its rows.

Subtrees that look the same are stored once, as a *kind*: 61 layers of 256 experts take little more than one of each. A
node is one module or tensor at one path. Its number is its position when the tree is walked from the top, a module's
own tensors before its child modules; the script finds a node's number from the sizes of the kinds before it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.paths import ancestors, joined, parent_of
from modelcli.model.tensors import TensorInfo
from modelcli.render import folding
from modelcli.render.views import shape

#: Numbered siblings of one kind are stored as one run from this many on.
RUN = 3


@dataclass(frozen=True)
class Child:
    """A module or tensor below a module: its own name, and the module or tensor."""

    name: str
    found: ModuleInfo | TensorInfo


class Tree:
    """The modules and tensors of a blueprint as one tree. Each is below the nearest module that its name has.

    The methods do not recurse, so a deep model cannot exhaust Python's stack.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        known = blueprint.by_path
        self._tensors: dict[str, list[Child]] = defaultdict(list)
        self._modules: dict[str, list[Child]] = defaultdict(list)
        for tensor in blueprint.tensors:
            above = parent_of(tensor.name)
            holder = above if above in known else next(path for path in ancestors(above) if path in known)
            self._tensors[holder].append(Child(_below(tensor.name, holder), tensor))
        for module in blueprint.modules:
            if module.path:
                above = parent_of(module.path)
                holder = above if above in known else next(path for path in ancestors(above) if path in known)
                self._modules[holder].append(Child(_below(module.path, holder), module))

    def tensors_of(self, path: str) -> Sequence[Child]:
        """The tensors that the module at this path holds itself."""
        return self._tensors.get(path, ())

    def modules_of(self, path: str) -> Sequence[Child]:
        """The child modules of the module at this path."""
        return self._modules.get(path, ())

    @cached_property
    def paths(self) -> list[str]:
        """The paths of all modules, each before those below it."""
        found, stack = [], [""]
        while stack:
            path = stack.pop()
            found.append(path)
            stack += [joined(path, child.name) for child in reversed(self.modules_of(path))]
        return found

    def numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the number of each module by its path, and of each tensor by its name."""
        modules: dict[str, int] = {}
        tensors: dict[str, int] = {}
        for number, found in enumerate(self._walked()):
            if isinstance(found, TensorInfo):
                tensors[found.name] = number
            else:
                modules[found.path] = number
        return modules, tensors

    def _walked(self) -> Iterator[ModuleInfo | TensorInfo]:
        for path in self.paths:
            yield self.blueprint.by_path[path]
            yield from (child.found for child in self.tensors_of(path))


def _below(name: str, holder: str) -> str:
    return name[len(holder) + 1 :] if holder else name


class Numbered:
    """Different values in the order in which they first appeared; each has a number."""

    def __init__(self, *first: Hashable) -> None:
        self.numbers: dict[Any, int] = {value: number for number, value in enumerate(first)}

    def of(self, value: Hashable) -> int:
        return self.numbers.setdefault(value, len(self.numbers))

    @property
    def values(self) -> list[Any]:
        return list(self.numbers)


def document(blueprint: Blueprint, tree: Tree) -> dict[str, Any]:
    """Return the tree of a model as JSON values.

    `types` (the names of a class and its base classes), `configs`, `shapes`, `dtypes` and `names` are tables; the
    first of the first three stands for an unknown one. `tensors` are kinds of tensors: [shape, dtype, flags,
    trainable, tied to, bytes], where flags are 1 for a buffer plus 2 for one that is not saved. `modules` are kinds of
    modules: [children, trainable, type, config, output shape, mult-adds, executed, shared with, params]. Values at the
    end that follow from the others, or are not known, are left out. `children` alternates own names (in full, or as
    numbers in `names`) and kinds, or has [prefix, first number, count, kind] for a run; kinds of tensors are written as
    -1 - kind. The last kind of a module is that of the model.
    """
    tables = _Tables()
    trace = blueprint.trace
    layers = {} if trace is None else trace.layers
    unseen = frozenset() if trace is None else frozenset(trace.unseen)
    passed = trace is not None and trace.reason is None
    facts: dict[str, _Facts] = {}
    for path in reversed(tree.paths):
        module = blueprint.by_path[path]
        children: list[tuple[str, int]] = []
        params, nbytes = 0, 0
        for child in tree.tensors_of(path):
            tensor = child.found
            assert isinstance(tensor, TensorInfo)
            children.append((child.name, -1 - tables.tensor(tensor)))
            if tensor.tied_to is None:
                nbytes += tensor.nbytes
                params += tensor.elements if tensor.kind == "parameter" else 0
        for child in tree.modules_of(path):
            assert isinstance(child.found, ModuleInfo)
            below = facts.pop(child.found.path)
            children.append((child.name, below.kind))
            nbytes += below.nbytes
            params += below.params
        ran = layers.get(path)
        counted = blueprint.params_of(path)
        kind = _shortened(
            _runs(children),
            _flag(blueprint.trainable_of(path)),
            tables.types.of((module.type, *module.bases[1:]) if module.type is not None else ()),
            tables.configs.of(" ".join(module.config.split())),
            tables.shapes.of("" if ran is None else shape(ran.output_shape)),
            None if ran is None else ran.macs,
            1 if ran is not None else 0 if passed and path not in unseen else None,
            None if module.shared_with is None else tables.names.of(module.shared_with),
            None if counted == params else counted,
        )
        facts[path] = _Facts(tables.modules.of(kind), nbytes, counted)
    return {
        "types": tables.types.values,
        "configs": tables.configs.values,
        "shapes": tables.shapes.values,
        "dtypes": tables.dtypes.values,
        "sizes": [ITEM_BYTES[dtype] for dtype in tables.dtypes.values],
        "tensors": tables.tensors.values,
        "modules": tables.named_modules(),
        "names": tables.names.values,
        "landmarks": {word: list(paths) for word, paths in blueprint.landmarks.items()},
    }


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a module needs to know of a child: its kind, its bytes, and its parameters."""

    kind: int
    nbytes: int
    params: int


class _Tables:
    """The tables of a document while it is made."""

    def __init__(self) -> None:
        self.types, self.configs, self.shapes, self.dtypes = Numbered(()), Numbered(""), Numbered(""), Numbered()
        self.names, self.tensors, self.modules = Numbered(), Numbered(), Numbered()

    def tensor(self, tensor: TensorInfo) -> int:
        """Return the kind of a tensor."""
        return self.tensors.of(
            _shortened(
                tensor.shape,
                self.dtypes.of(tensor.dtype),
                (1 if tensor.kind == "buffer" else 0) + (0 if tensor.persistent else 2),
                _flag(tensor.requires_grad if tensor.kind == "parameter" else None),
                None if tensor.tied_to is None else self.names.of(tensor.tied_to),
                tensor.stored_bytes,
            )
        )

    def named_modules(self) -> list[Any]:
        """Return the kinds of modules, with numbers for the names of children that occur more than once."""
        counts = Counter(name for kind in self.modules.values for name in kind[0] if isinstance(name, str))
        numbers = {name: self.names.of(name) for name, count in counts.items() if count > 1}
        return [
            [[numbers.get(each, each) if isinstance(each, str) else each for each in kind[0]], *kind[1:]]
            for kind in self.modules.values
        ]


def _shortened(*values: Any) -> tuple[Any, ...]:
    """Return values without those at the end that are None or 0, for which the script has the same meaning.

    At the end of the kind of a module, 0 mult-adds are kept, because None says that they are not known.
    """
    end = len(values)
    while end > 1 and (values[end - 1] is None or (values[end - 1] == 0 and end - 1 not in _ZERO_COUNTS[len(values)])):
        end -= 1
    return values[:end]


#: The positions at which 0 and None differ, by the number of values of a kind.
_ZERO_COUNTS = {6: frozenset((3, 4, 5)), 9: frozenset((1, 5, 6, 7, 8))}


def _flag(trainable: object) -> int | None:
    """Return 1 for trainable, 0 for frozen, 2 for partial, None for unknown."""
    return 2 if trainable == "partial" else None if trainable is None else int(bool(trainable))


def _runs(children: Sequence[tuple[str, int]]) -> tuple[Any, ...]:
    """Return children with each run of numbered siblings of one kind as one entry."""
    found: list[Any] = []
    start = 0
    while start < len(children):
        name, kind = children[start]
        end = start + 1
        while (
            end < len(children)
            and children[end][1] == kind
            and folding.counts_on(children[end - 1][0], children[end][0])
        ):
            end += 1
        if end - start >= RUN:
            found.append((*folding.numbered(name), end - start, kind))
        else:
            end = start + 1
            found += (name, kind)
        start = end
    return tuple(found)
