"""Compare two blueprints by the names of their modules and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.paths import lies_in
from modelcli.model.tensors import Shape, TensorInfo


@dataclass(frozen=True)
class ModuleChange:
    """How one module differs. `before` and `after` are its printed forms; None if it does not exist."""

    path: str
    change: Literal["added", "removed", "type", "config"]
    before: str | None
    after: str | None


@dataclass(frozen=True)
class TensorKind:
    """The shape and dtype of a tensor that only one model has. `shape` is None for a lazy one."""

    shape: Shape | None
    dtype: str


#: What one model has: a shape, a dtype, a layout or a flag; for an added or removed tensor its shape and dtype.
Side = Shape | TensorKind | str | bool | None


@dataclass(frozen=True)
class TensorChange:
    """One way in which a tensor differs.

    `before` and `after` are None for values, and for tensors that were not compared. `max_abs_diff` is the largest
    difference of values: NaN if only one side has a NaN, None if the bytes that differ are not numbers.
    """

    name: str
    change: Literal["added", "removed", "shape", "dtype", "layout", "trainable", "values", "not compared"]
    before: Side = None
    after: Side = None
    max_abs_diff: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The differences of two models. `equal` is the number of tensors without a difference."""

    modules: tuple[ModuleChange, ...]
    tensors: tuple[TensorChange, ...]
    equal: int
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return not (self.modules or self.tensors)


@dataclass(frozen=True)
class Structure:
    """The differences of two models besides values: modules, and the changes of each tensor by its name.

    `comparable` are the tensors whose values can be compared: both sides have them, with the same known shape and
    layout. `extras` are the entries of either side that are not tensors.
    """

    modules: tuple[ModuleChange, ...]
    tensors: Mapping[str, Sequence[TensorChange]]
    comparable: Sequence[str]
    extras: Sequence[str] = ()


def structure(
    before: Blueprint,
    after: Blueprint,
    selected: Sequence[str] = (),
    without: Sequence[str] = (),
    *,
    modules: bool = True,
    extras: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> Structure:
    """Compare what `selected` picks in either model (all where it is empty) less what `without` picks.

    The order is that of the first model, what is new behind it. Modules are compared where both models know their
    types, and only with `modules`; buffers that are not saved likewise. Raises RequestError for a selector that matches
    nothing in either, and where selectors leave nothing to compare. `extras` are the names of entries of either state
    dict that are no tensors, which selectors pick by their names as well.
    """
    chosen = _Chosen.of(_with(before, extras[0]), _with(after, extras[1]), selected, without)
    typed = [found.root.type is not None for found in (before, after)]
    tensors: dict[str, list[TensorChange]] = {}
    comparable = []
    for name, left, right in _joined(_tensors(before, typed[1]), _tensors(after, typed[0])):
        if not chosen.has_tensor(name):
            continue
        tensors[name] = _tensor_changes(name, left, right)
        if left is not None and right is not None and _is_comparable(left, right):
            comparable.append(name)
    modules = modules and all(typed)
    others = [name for name in dict.fromkeys((*extras[0], *extras[1])) if chosen.has_tensor(name)]
    if not tensors and not others and not (modules and any(map(chosen.has_module, (*before.by_path, *after.by_path)))):
        _require_all(selected, without)
    return Structure(_module_changes(before, after, chosen) if modules else (), tensors, comparable, others)


def _with(blueprint: Blueprint, extras: Sequence[str]) -> Blueprint:
    """Return a blueprint with the entries that are not tensors added, so that selectors find them."""
    if not extras:
        return blueprint
    return replace(blueprint, tensors=(*blueprint.tensors, *(TensorInfo(name, (0,), "uint8") for name in extras)))


def _require_all(selected: Sequence[str], without: Sequence[str]) -> None:
    """Raise RequestError if the selectors leave nothing to compare, since the answer "the same" would be wrong."""
    picks = " ".join(f"-s {quoted(text)}" for text in selected)
    if without:
        everything = f"all that {picks} picks" if picks else "everything"
        words = " ".join(f"--except {quoted(text)}" for text in without)
        raise RequestError(
            f"nothing is left to compare: {words} leaves out {everything}", "narrow --except, or remove it"
        )
    if selected:
        raise RequestError(
            f"nothing is left to compare: {picks} picks no tensor, and modules are not compared here",
            "modelcli params lists the tensors",
        )


# --- what is compared ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """The names that selectors picked in either model. None means all."""

    tensors: set[str] | None
    modules: set[str] | None
    without_tensors: set[str] = field(default_factory=set)
    without_modules: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, before: Blueprint, after: Blueprint, selected: Sequence[str], without: Sequence[str]) -> _Chosen:
        tensors, modules = _picked(before, after, selected) if selected else (None, None)
        return cls(tensors, modules, *_picked(before, after, without))

    def has_tensor(self, name: str) -> bool:
        return (self.tensors is None or name in self.tensors) and name not in self.without_tensors

    def has_module(self, path: str) -> bool:
        """Whether a module, or one above it, was picked."""
        return (self.modules is None or lies_in(path, self.modules)) and not lies_in(path, self.without_modules)


def _picked(before: Blueprint, after: Blueprint, texts: Iterable[str]) -> tuple[set[str], set[str]]:
    tensors: set[str] = set()
    modules: set[str] = set()
    for text in texts:
        selector = selectors.parse(text)
        found = [
            (selectors.matched_tensors(selector, blueprint), selectors.matched_modules(selector, blueprint))
            for blueprint in (before, after)
        ]
        if not any(names for pair in found for names in pair):
            selectors.select_tensors(before, [text])  # which raises, with what is near
        for names, paths in found:
            tensors |= names
            modules |= paths
    return tensors, modules


def _tensors(blueprint: Blueprint, other_is_typed: bool) -> dict[str, TensorInfo]:
    """Return the tensors of one side. A file that records no architecture has no non-persistent buffers."""
    return {tensor.name: tensor for tensor in blueprint.tensors if tensor.persistent or other_is_typed}


def _joined(
    before: Mapping[str, TensorInfo], after: Mapping[str, TensorInfo]
) -> Iterable[tuple[str, TensorInfo | None, TensorInfo | None]]:
    for name, tensor in before.items():
        yield name, tensor, after.get(name)
    for name, tensor in after.items():
        if name not in before:
            yield name, None, tensor


# --- structure -----------------------------------------------------------------------------------------------------


def _module_changes(before: Blueprint, after: Blueprint, chosen: _Chosen) -> tuple[ModuleChange, ...]:
    changes: list[ModuleChange] = []
    for path, module in before.by_path.items():
        if chosen.has_module(path) and (change := _module_change(module, after.by_path.get(path))) is not None:
            changes.append(change)
    changes += [
        ModuleChange(path, "added", None, _printed(module))
        for path, module in after.by_path.items()
        if path not in before.by_path and chosen.has_module(path)
    ]
    return tuple(changes)


def _module_change(before: ModuleInfo, after: ModuleInfo | None) -> ModuleChange | None:
    if after is None:
        return ModuleChange(before.path, "removed", _printed(before), None)
    if before.type != after.type:
        return ModuleChange(before.path, "type", _printed(before), _printed(after))
    if _config(before) != _config(after):
        return ModuleChange(before.path, "config", _printed(before), _printed(after))
    return None


def _config(module: ModuleInfo) -> str:
    return " ".join(module.config.split())


def _printed(module: ModuleInfo) -> str:
    config = _config(module)
    return f"{module.type}({config})" if config else str(module.type)


def _tensor_changes(name: str, before: TensorInfo | None, after: TensorInfo | None) -> list[TensorChange]:
    """Return the differences of a tensor besides its values."""
    if before is None or after is None:
        return [TensorChange(name, "added" if before is None else "removed", _kind(before), _kind(after))]
    changes = []
    if before.shape != after.shape:
        changes.append(TensorChange(name, "shape", before.shape, after.shape))
    if before.dtype != after.dtype:
        changes.append(TensorChange(name, "dtype", before.dtype, after.dtype))
    if before.layout != after.layout:
        changes.append(TensorChange(name, "layout", before.layout, after.layout))
    flags = (before.requires_grad, after.requires_grad)
    if None not in flags and flags[0] != flags[1]:
        changes.append(TensorChange(name, "trainable", *flags))
    return changes


def _is_comparable(before: TensorInfo, after: TensorInfo) -> bool:
    """Whether the values of both tensors can be compared element by element; a lazy tensor has no values yet."""
    return before.shape is not None and (before.shape, before.layout) == (after.shape, after.layout)


def _kind(tensor: TensorInfo | None) -> TensorKind | None:
    return None if tensor is None else TensorKind(tensor.shape, tensor.dtype)
