"""The state-dict model: the keys of a checkpoint of unknown architecture, and where each tensor's values come from.

It is plain data, without torch and without values. An edit makes another model of it. A cast only records the new
dtype; the values are converted when the model is written. All functions take time in proportion to the number of keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from operator import add
from typing import Any, Protocol, cast

from modelcli.errors import RequestError
from modelcli.model.blueprint import Blueprint, ModuleInfo, depth_first
from modelcli.model.dtypes import ITEM_BYTES, is_differentiable
from modelcli.model.paths import joined
from modelcli.model.shared_bytes import Shown
from modelcli.model.tensors import Kind, Shape, TensorInfo, value_class

#: Each of these numbers stands for 2^40 identities; the tensors of a file have those below.
_UNUSED = itertools.count(1)
#: How deep modules may be nested: PyTorch recurses into them, with several stack frames for each level.
MAX_MODULE_DEPTH = 200


class Source(Protocol):
    """Where the bytes of a storage come from. Equal sources count as the same storage."""

    @property
    def nbytes(self) -> int: ...

    def __hash__(self) -> int: ...


@value_class
class StateDictTensor:
    """One tensor under one key: a view of the bytes of a source.

    Attributes:
        identity: the same number for all names of a tied tensor. Edits keep it.
        shape: its shape; None for a lazy parameter.
        dtype: its current dtype.
        stride, offset: the view, in elements.
        source: the bytes; None if the tensor has no values.
        kind: `parameter` or `buffer`.
        requires_grad: its flag; None for a buffer, or if it is not known.
        persistent: whether it is in the state dict.
        cast_from: its earlier dtypes; the first is that of the source.
        copied: 0, or the number of a copy: tensors with different numbers do not share their bytes, even if these come
            from the same source.
    """

    identity: int
    shape: Shape | None
    dtype: str
    stride: Shape
    offset: int
    source: Source | None
    kind: Kind
    requires_grad: bool | None = None
    persistent: bool = True
    cast_from: tuple[str, ...] = ()
    copied: int = 0

    @property
    def elements(self) -> int:
        return prod(self.shape) if self.shape is not None else 0

    @property
    def storage(self) -> object:
        """A key that two tensors share if they are views of the same bytes."""
        if not self.cast_from and not self.copied:
            return self.source
        return (self.source, self.cast_from, self.dtype, self.copied)

    @property
    def storage_bytes(self) -> int:
        """The size of its storage in bytes, after the casts."""
        if self.source is None:
            return 0
        if not self.cast_from:
            return self.source.nbytes
        return self.source.nbytes // ITEM_BYTES[self.cast_from[0]] * ITEM_BYTES[self.dtype]

    @property
    def byte_span(self) -> tuple[int, int]:
        """The range of bytes of its storage that it uses: the first byte, and the one after the last."""
        item, shape = ITEM_BYTES[self.dtype], self.shape or ()
        if 0 in shape:
            return self.offset * item, self.offset * item
        last = 1 + sum((size - 1) * step for size, step in zip(shape, self.stride, strict=True))
        return self.offset * item, (self.offset + last) * item

    def trained(self, flag: bool | None) -> StateDictTensor:
        """Return the same tensor with this `requires_grad`; False for a dtype that cannot have a gradient."""
        found = flag and is_differentiable(self.dtype)
        return StateDictTensor(
            self.identity, self.shape, self.dtype, self.stride, self.offset, self.source, self.kind, found,
            self.persistent, self.cast_from, self.copied,
        )  # fmt: skip

    def cast(self, dtype: str) -> StateDictTensor:
        """Return the same tensor with another dtype."""
        return StateDictTensor(
            self.identity, self.shape, dtype, self.stride, self.offset, self.source, self.kind, self.requires_grad,
            self.persistent, (*self.cast_from, self.dtype), self.copied,
        )  # fmt: skip


class InertEntry(Protocol):
    """An entry that is not a plain tensor (quantized, sparse, or another value). Edits keep it unchanged."""

    @property
    def value(self) -> Any:
        """The value in the file."""
        ...

    @property
    def view(self) -> object | None:
        """A key that two tensors share if they consist of the same bytes; None if there are none."""
        ...

    def info(self, name: str, original: str) -> TensorInfo | None:
        """Return the tensor as a blueprint describes it; None for an entry that is not a tensor."""
        ...

    def inner(self, name: str) -> Iterable[tuple[TensorInfo, object]]:
        """Return the tensors inside an entry that is not a tensor, each with a key that is equal for tied tensors."""
        ...


Entry = StateDictTensor | InertEntry


@value_class
class StateDictModule:
    """What is known about a module besides its keys.

    Attributes:
        origin: its path in the file, even if edits have moved it; None for a new module.
        version: the version of a new module's class.
        info: the description of a new module except for its path; None after a rename of its keys.
        brief: a short text for a new module.
        made: the new module itself, for the caller. A module with several paths is one object.
    """

    origin: str | None
    version: int | None = None
    info: ModuleInfo | None = None
    brief: str | None = None
    made: Any = None


#: The path of a module, the module, and the names and values of its own entries.
Part = tuple[str, StateDictModule, Iterable[tuple[str, Entry]]]


@dataclass(frozen=True)
class NewModule:
    """A module that an edit adds.

    Attributes:
        parts: the module and its submodules in order, each with its path inside it.
        brief: a short text for it.
        params: the number of its parameters.
        identities: the number of its distinct tensors.
    """

    parts: tuple[Part, ...]
    brief: str
    params: int
    identities: int


@dataclass(frozen=True)
class StateDictModel:
    """The entries by their keys, and the modules that the keys name.

    A module comes before its submodules, and these follow it directly. Entries are in the order of their modules;
    within a module, parameters come first, then buffers, then others.

    Attributes:
        entries: the entries.
        modules: the modules by their paths.
        described: all entries as a blueprint describes them, if that is known already; else empty.
        described_modules: likewise for the modules.
    """

    entries: Mapping[str, Entry]
    modules: Mapping[str, StateDictModule]
    described: Mapping[str, TensorInfo] = field(default_factory=dict, repr=False, compare=False)
    described_modules: tuple[ModuleInfo, ...] = field(default=(), repr=False, compare=False)

    @cached_property
    def tensors(self) -> Mapping[str, StateDictTensor]:
        """The plain tensors by their keys: parameters and buffers, without inert entries."""
        if not self.inert:
            return cast("Mapping[str, StateDictTensor]", self.entries)
        return {name: entry for name, entry in self.entries.items() if isinstance(entry, StateDictTensor)}

    @cached_property
    def inert(self) -> Mapping[str, InertEntry]:
        """The entries that are no plain tensors."""
        if set(map(type, self.entries.values())) <= {StateDictTensor}:
            return {}
        return {name: entry for name, entry in self.entries.items() if not isinstance(entry, StateDictTensor)}

    @cached_property
    def keys(self) -> list[str]:
        """The keys in the order of PyTorch's `state_dict()`: inert entries come after their module's submodules."""
        if not self.inert:
            return [name for name, tensor in self.tensors.items() if tensor.persistent]
        own: dict[str, list[str]] = {path: [] for path in self.modules}
        late: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            path = split_key(name)[0]
            if not isinstance(entry, StateDictTensor):
                late.setdefault(path, []).append(name)
            elif entry.persistent:
                own[path].append(name)
        found: list[str] = []
        open_modules: list[str] = []
        for path in self.modules:
            while open_modules and not _is_below(path, open_modules[-1]):
                found += late.get(open_modules.pop(), ())
            found += own[path]
            open_modules.append(path)
        while open_modules:
            found += late.get(open_modules.pop(), ())
        return found

    @cached_property
    def blueprint(self) -> Blueprint:
        """The model as a blueprint. Types and settings are known only for modules that edits have added."""
        if self.described:
            return Blueprint(self.module_infos, tuple(map(self.described.__getitem__, self.entries)))
        tensors: list[TensorInfo] = []
        first: dict[int, str] = {}
        first_view: dict[object, str] = {}
        for name, entry in self.entries.items():
            if isinstance(entry, StateDictTensor):
                original = first.setdefault(entry.identity, name)
                tied_to = None if original == name else original
                flag = entry.requires_grad if entry.kind == "parameter" else None
                tensors.append(TensorInfo(name, entry.shape, entry.dtype, entry.kind, flag, tied_to, entry.persistent))
            elif (info := entry.info(name, first_view.setdefault(entry.view or name, name))) is not None:
                tensors.append(info)
        return Blueprint(self.module_infos, (*tensors, *self._inner_rows()))

    @cached_property
    def module_infos(self) -> tuple[ModuleInfo, ...]:
        """The modules as a blueprint describes them."""
        if self.described_modules:
            return self.described_modules
        paths: dict[int, str] = {}
        return tuple([_module_info(path, module, paths) for path, module in self.modules.items()])

    def _inner_rows(self) -> Iterator[TensorInfo]:
        """Yield the tensors inside entries that are not tensors."""
        first: dict[object, str] = {}
        taken = set(self.entries)
        for name in self.keys if self.inert else ():
            entry = self.entries[name]
            if isinstance(entry, StateDictTensor):
                continue
            for info, view in entry.inner(name):
                if info.name not in taken:
                    taken.add(info.name)
                    original = first.setdefault(view or info.name, info.name)
                    yield info if original == info.name else _tied(info, original)

    @cached_property
    def shown(self) -> dict[str, Shown]:
        """The bytes of a storage that each tensor uses."""
        found = {}
        for name, tensor in self.tensors.items():
            has_bytes = tensor.source is not None and tensor.elements
            storage = tensor.storage if has_bytes else None
            found[name] = Shown(tensor.identity, storage, *(tensor.byte_span if has_bytes else (0, 0)))
        return found

    def with_sources(self, sources: Mapping[object, Source]) -> StateDictModel:
        """Return the model with other sources for some storages. A new source has its tensors' current dtype."""
        entries = dict(self.entries)
        for name, tensor in self.tensors.items():
            if tensor.source is not None and (source := sources.get(tensor.storage)) is not None:
                entries[name] = replace(tensor, source=source, cast_from=(), copied=0)
        return StateDictModel(entries, self.modules)

    @cached_property
    def next_identity(self) -> int:
        """The first of 2^40 numbers that no tensor of any model has as its identity.

        An edit numbers its new tensors from here on. The numbers of removed tensors are not used again: a new tensor
        would be taken for the old one, which decides where it stands in a file.
        """
        return next(_UNUSED) << 40

    @cached_property
    def floating_dtype(self) -> str | None:
        """The dtype of the first floating-point parameter."""
        dtypes = (tensor.dtype for tensor in self.tensors.values() if tensor.kind == "parameter")
        return next((dtype for dtype in dtypes if dtype.startswith(("float", "bfloat"))), None)

    @cached_property
    def own_entries(self) -> dict[str, list[str]]:
        """The keys of each module's own entries."""
        own: dict[str, list[str]] = {path: [] for path in self.modules}
        for name in self.entries:
            own[split_key(name)[0]].append(name)
        return own

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """The paths of each module's children, in order."""
        found: dict[str, list[str]] = {path: [] for path in self.modules}
        for path in self.modules:
            if path:
                found[path.rpartition(".")[0]].append(path)
        return found

    def _parts(self, paths: Iterable[str], old: str = "", new: str = "") -> Iterator[Part]:
        """Yield the modules at these paths with their entries, moved from below `old` to below `new`."""
        for path in paths:
            own = ((split_key(name)[1], self.entries[name]) for name in self.own_entries[path])
            yield (path if old == new else new + path[len(old) :]), self.modules[path], own

    @cached_property
    def _end_of(self) -> dict[str, int]:
        """For each module, the position in the order of modules after it and its submodules."""
        found: dict[str, int] = {}
        open_modules: list[str] = []
        for position, path in enumerate(self.modules):
            while open_modules and not _is_below(path, open_modules[-1]):
                found[open_modules.pop()] = position
            open_modules.append(path)
        return found | dict.fromkeys(open_modules, len(self.modules))

    def with_modules(self, new: Mapping[str, NewModule]) -> StateDictModel:
        """Return the model with new modules at these paths, none of which is below another."""

        def parts() -> Iterator[Part]:
            paths, position = self._paths, 0
            while position < len(paths):
                path = paths[position]
                if path in new:
                    yield from _placed(new[path], path)
                    position = self._end_of[path]
                else:
                    yield from self._parts([path])
                    position += 1

        return assembled(parts())

    def with_children(
        self, holder: str, children: Mapping[str, str | NewModule], names: Mapping[str, str] | None = None
    ) -> StateDictModel:
        """Return the model with other children of one module.

        Args:
            holder: the path of the module.
            children: its children by name, in order: the path of a module of the model, or a new module.
            names: new names for the module's own entries.
        """
        return self.with_children_of({holder: children}, names)

    def with_children_of(
        self, children: Mapping[str, Mapping[str, str | NewModule]], names: Mapping[str, str] | None = None
    ) -> StateDictModel:
        """Return the model with other children of several modules, none of which lies inside another one.

        Args:
            children: by the path of each module, its children by name, in order: see `with_children`.
            names: new names for the modules' own entries.
        """
        paths, renamed = self._paths, names or {}

        def parts() -> Iterator[Part]:
            done = 0
            for holder in sorted(children, key=self._order.__getitem__):
                yield from self._parts(paths[done : self._order[holder]])
                done = self._end_of[holder]
                for path, module, own in self._parts([holder]):
                    yield path, module, ((renamed.get(name, name), entry) for name, entry in own)
                for name, child in children[holder].items():
                    path_of_child = joined(holder, name)
                    if isinstance(child, NewModule):
                        yield from _placed(child, path_of_child)
                    else:
                        first = self._order[child]
                        yield from self._parts(paths[first : self._end_of[child]], child, path_of_child)
            yield from self._parts(paths[done:])

        return assembled(parts())

    def modules_below(self, path: str) -> list[str]:
        """Return the paths of a module and its submodules, in order."""
        return self._paths[self._order[path] : self._end_of[path]]

    def names_below(self, path: str) -> Iterator[str]:
        """Yield the keys of all entries of a module and its submodules, in order."""
        for below in self.modules_below(path):
            yield from self.own_entries[below]

    @cached_property
    def _paths(self) -> list[str]:
        return list(self.modules)

    @cached_property
    def _order(self) -> dict[str, int]:
        return {path: position for position, path in enumerate(self.modules)}

    def by_identity(self, names: Iterable[str]) -> dict[int, StateDictTensor]:
        """Return the distinct tensors of these keys by identity."""
        tensors = self.tensors
        return {tensors[name].identity: tensors[name] for name in names}

    def with_tensors(
        self, changed: Callable[[StateDictTensor], StateDictTensor], names: Iterable[str]
    ) -> StateDictModel:
        """Return the model with the tensors of these keys changed, under all of their names."""
        new = {identity: changed(tensor) for identity, tensor in self.by_identity(names).items()}
        entries = {name: new.get(tensor.identity, tensor) for name, tensor in self.tensors.items()}
        return StateDictModel({**self.entries, **entries}, self.modules, described_modules=self.module_infos)


def of_entries(
    entries: Mapping[str, Entry],
    known: Callable[[str], StateDictModule] = StateDictModule,
    pay: Callable[[int], None] | None = None,
) -> StateDictModel:
    """Return the model with these entries. Modules are in the order in which the keys first name them.

    Args:
        entries: the entries by key.
        known: returns what is known about the module at a path; by default, that it is at this path in the file.
        pay: see `model.blueprint.from_keys`.
    """
    holders = [name.rpartition(".")[0] if name[:1] != "." else "" for name in entries]  # as in split_key
    paths = depth_first(holders, pay)
    modules = dict(zip(paths, map(known, paths), strict=True))
    positions = dict(zip(paths, range(0, 3 * len(paths), 3), strict=True))
    order = list(map(positions.__getitem__, holders))
    if any(ranks := [*map(_rank, entries.values())]):
        order = [*map(add, order, ranks)]
    if order == sorted(order):  # as the keys of nearly every file are
        return StateDictModel(dict(entries), modules)
    names = [*entries]
    ordered = [names[number] for number in sorted(range(len(names)), key=order.__getitem__)]
    return StateDictModel({name: entries[name] for name in ordered}, modules)


def _rank(entry: Entry) -> int:
    """Return the sort key of a module's own entries: parameters, buffers, all others."""
    if not isinstance(entry, StateDictTensor):
        return 2
    return 0 if entry.kind == "parameter" else 1


def _placed(new: NewModule, at: str) -> Iterator[Part]:
    """Yield a new module and its submodules at a path."""
    for path, module, own in new.parts:
        yield (joined(at, path) if path else at), module, own


def assembled(parts: Iterable[Part]) -> StateDictModel:
    """Return the model of these modules, in this order.

    Raises RequestError for a key that starts with a dot and would move: of `0..weight`, the module would be `0.`.
    """
    entries: dict[str, Entry] = {}
    modules: dict[str, StateDictModule] = {}
    for path, module, own in parts:
        modules[path] = module
        for name, entry in own:
            if path and name.startswith("."):  # `0..weight` would be of a module `0.`
                raise RequestError(
                    f"the key {name!r} starts with a dot, so it cannot move to {path}", "rename the key first"
                )
            entries[joined(path, name)] = entry
    return StateDictModel(entries, modules)


def split_key(name: str) -> tuple[str, str]:
    """Return the path of the module of a key, and the name in it. A leading dot belongs to the name: `.weight`."""
    if name.startswith("."):
        return "", name  # a module with an empty name would have the same path as the root
    path, _, own = name.rpartition(".")
    return path, own


def _is_below(path: str, above: str) -> bool:
    return not above or path.startswith(f"{above}.")


def _module_info(path: str, module: StateDictModule, paths: dict[int, str]) -> ModuleInfo:
    """Return a module as a blueprint describes it. `paths` collects the first path of each new module."""
    info = module.info
    if info is None:
        return ModuleInfo(path, None)
    first = paths.setdefault(id(module.made), path)
    shared_with = None if first == path else first
    return ModuleInfo(path, info.type, info.bases, info.config, shared_with, info.own_repr, info.absent)


def _tied(info: TensorInfo, original: str) -> TensorInfo:
    return TensorInfo(
        info.name, info.shape, info.dtype, info.kind, info.requires_grad, original, info.persistent, info.layout,
        info.stored_bytes,
    )  # fmt: skip
