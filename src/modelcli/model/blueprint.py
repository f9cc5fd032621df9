"""The blueprint: the modules and tensors of a model as plain data, without torch and without values.

Everything that modelcli shows comes from a blueprint. Paths are PyTorch's: the root is `""` here, and `.` in output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from modelcli.model.paths import ancestors, parent_of
from modelcli.model.tensors import Shape, TensorInfo, value_class
from modelcli.model.totals import NO_PARAMETERS, Totals, _counted_once, _Sum, totals_of

#: Whether the parameters of a module are trainable; None if that is not known or if it has no parameters.
Trainable = bool | Literal["partial"] | None


@value_class
class ModuleInfo:
    """One module at one path.

    Attributes:
        path: the dotted path; `""` is the root.
        type: the name of its class; None if only key names are known.
        bases: the names of its class and its base classes, up to `Module` and without it.
        config: its `extra_repr()`.
        shared_with: the first path of the same module, if this is another path of it.
        own_repr: the whole text that it prints, if its class overrides `__repr__`.
        absent: position and name of each child that is None; only `print(module)` shows them.
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
    """The output shape and mult-adds of one module in a forward pass.

    Attributes:
        output_shape: a list of ints for a tensor, a list or dict of those for several tensors, None for no tensor.
        macs: the multiply-accumulates of the module and its submodules; None for a further path of a shared module,
            whose calls are counted at another path.
    """

    output_shape: Any
    macs: int | None


@dataclass(frozen=True)
class Trace:
    """A forward pass, complete or not.

    Attributes:
        inputs: the shapes of the inputs; None if they are not known.
        layers: the modules that ran, by path. Other modules were not called, except those in `unseen`.
        macs: the multiply-accumulates of the whole pass; None if it did not finish.
        input_bytes: the size of the inputs.
        forward_backward_bytes: the estimated size of the activations, forward and backward.
        reason: one line that says why the pass did not finish; None if it did.
        device: where the pass ran: `meta`, `cpu`, or `fake` for fake tensors; None if no pass was made.
        notes: what users need to know about how the pass was made.
        uncounted: the operators that multiply and that modelcli cannot count; with any, `macs` is a lower bound.
        unseen: the modules inside a scripted module that ran; whether they ran is not known.
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
    """A model as plain data.

    Attributes:
        modules: its modules, in PyTorch's order.
        tensors: its parameters and buffers, in PyTorch's order.
        trace: a forward pass, if one was made.
        landmarks: the paths of the modules that its library calls the classifier (`head`) and the first layer (`stem`),
            by these two words. A word is left out where the library does not say.
    """

    modules: tuple[ModuleInfo, ...]
    tensors: tuple[TensorInfo, ...]
    trace: Trace | None = None
    landmarks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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
        """The sums of the parameters of each module and its submodules, added up from the leaves to the root."""
        sums = {module.path: _Sum() for module in self.modules}
        for path, tensor, times in _counted_once(self.tensors):
            holder = path if path in sums else next(above for above in ancestors(path) if above in sums)
            sums[holder].add(tensor, times)
        # A module comes after its parent, so the reverse order reaches all children of a module before it.
        for path in reversed(sums):
            if path and (above := sums.get(parent_of(path))) is not None:
                above.merge(sums[path])
        return sums

    def params_of(self, path: str) -> int:
        """`sum(p.numel() for p in module.parameters())` of the module at this path."""
        return self._below.get(path, NO_PARAMETERS).elements

    def trainable_of(self, path: str) -> Trainable:
        """Whether the parameters at and below this path are trainable: True, False, or `partial`.

        None if there are no parameters, or if a flag is unknown and the known ones do not already make it `partial`.
        """
        below = self._below.get(path, NO_PARAMETERS)
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
    pay: Callable[[int], None] | None = None,
) -> Blueprint:
    """Return the blueprint of a plain state dict: the tree that its keys describe.

    Args:
        tensors: the tensors of the state dict.
        types: class names by path, if the file records any.
        pay: a function called with the length of each path before it is added; it raises if the total is too large.
            (A key of 4,000 characters can describe 2,000 modules.)
    """
    listed, types = tuple(tensors), types or {}
    paths = depth_first(chain(types, [tensor.name.rpartition(".")[0] for tensor in listed]), pay)
    if not types:
        return Blueprint(tuple([ModuleInfo(path, None) for path in paths]), listed)
    named = ((path, types.get(path)) for path in paths)
    modules = (ModuleInfo(path, kind, () if kind is None else (kind,)) for path, kind in named)
    return Blueprint(tuple(modules), listed)


def depth_first(paths: Iterable[str], pay: Callable[[int], None] | None = None) -> list[str]:
    """Return paths and all paths above them: a parent before its children, each subtree as a whole.

    Siblings are in the order of first appearance. `pay` is that of `from_keys`.
    """
    found = {"": None}
    last, above_last, is_depth_first = "", "", True  # as the keys of nearly every file are
    for path in paths:
        if path in found:  # most modules have several tensors
            continue
        above = path.rpartition(".")[0]
        if above == above_last or above in found:  # most stand behind a sibling, of which the first test is enough
            if pay is not None:
                pay(len(path))
            if above != above_last:
                is_depth_first = is_depth_first and (not above or above == last or last.startswith(above + "."))
                above_last = above
            found[path], last = None, path
            continue
        new = []
        while path not in found:
            if pay is not None:
                pay(len(path))
            new.append(path)
            path = path.rpartition(".")[0]
        is_depth_first = is_depth_first and (not path or f"{last}.".startswith(f"{path}."))
        last, above_last = new[0], above
        found.update(dict.fromkeys(reversed(new)))
    return list(found) if is_depth_first else _sorted_depth_first(found)


def _sorted_depth_first(paths: Iterable[str]) -> list[str]:
    """Return paths depth-first. Each comes after the one above it, as do siblings that appeared later."""
    children: dict[str, list[str]] = {}
    for path in paths:
        children[path] = []
        if path:
            children[path.rpartition(".")[0]].append(path)
    found, stack = [], [""]
    while stack:
        path = stack.pop()
        found.append(path)
        stack += reversed(children[path])
    return found
