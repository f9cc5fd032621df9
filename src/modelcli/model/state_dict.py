"""A state-dict model: the keys of a checkpoint of unknown architecture, and where each tensor's values come from.

It is plain data, without torch and without a single value. An edit makes another model of it; a cast is a dtype that is
written down, and becomes bytes when the model is written. Everything here takes time in proportion to the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Protocol

from modelcli.model.blueprint import Blueprint, ModuleInfo, depth_first, tree_of
from modelcli.model.dtypes import ITEM_BYTES, is_differentiable
from modelcli.model.paths import joined
from modelcli.model.shared_bytes import Shown
from modelcli.model.tensors import Kind, Shape, TensorInfo, value_class

#: How deep modules may lie in one another: PyTorch recurses into them, some frames for each level.
MAX_MODULE_DEPTH = 200


class Source(Protocol):
    """Where the bytes of a storage come from. Equal sources are one storage."""

    @property
    def nbytes(self) -> int: ...

    def __hash__(self) -> int: ...


@value_class
class StateDictTensor:
    """One tensor under one key: a view (`stride` and `offset` in elements) into the bytes of a source.

    `identity` is one number for all names of a tied tensor, whatever edits do to it. `dtype` is the one that it has
    now, and `cast_from` the ones that it had before, the first that of the source's bytes. `requires_grad` is None
    where nothing says whether a parameter is trained, and for a buffer. `shape` is None for a lazy parameter, and
    `source` for a tensor that nothing gives values to.
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

    @property
    def elements(self) -> int:
        return prod(self.shape) if self.shape is not None else 0

    @property
    def storage(self) -> object:
        """Equal for two tensors that are views of the same bytes."""
        return (self.source, self.cast_from, self.dtype) if self.cast_from else self.source

    @property
    def storage_bytes(self) -> int:
        """The size of the storage that it is a view of, after the casts."""
        if self.source is None:
            return 0
        if not self.cast_from:
            return self.source.nbytes
        return self.source.nbytes // ITEM_BYTES[self.cast_from[0]] * ITEM_BYTES[self.dtype]

    @property
    def byte_span(self) -> tuple[int, int]:
        """The bytes of its storage that it lies in: the first, and the one after the last."""
        item, shape = ITEM_BYTES[self.dtype], self.shape or ()
        if 0 in shape:
            return self.offset * item, self.offset * item
        last = 1 + sum((size - 1) * step for size, step in zip(shape, self.stride, strict=True))
        return self.offset * item, (self.offset + last) * item

    def trained(self, flag: bool | None) -> StateDictTensor:
        """The same tensor with this flag: whole numbers have no gradient, whatever is asked for."""
        found = flag and is_differentiable(self.dtype)
        return StateDictTensor(
            self.identity, self.shape, self.dtype, self.stride, self.offset, self.source, self.kind, found,
            self.persistent, self.cast_from,
        )  # fmt: skip

    def cast(self, dtype: str) -> StateDictTensor:
        """The same tensor in another dtype."""
        return StateDictTensor(
            self.identity, self.shape, dtype, self.stride, self.offset, self.source, self.kind, self.requires_grad,
            self.persistent, (*self.cast_from, self.dtype),
        )  # fmt: skip


class InertEntry(Protocol):
    """An entry that is no view into one storage (quantized, sparse), or no tensor: it is carried along as it is."""

    @property
    def value(self) -> Any:
        """What the file has there."""
        ...

    @property
    def view(self) -> object | None:
        """Equal for two tensors that are the same part of the same storage; None where there is nothing to share."""
        ...

    def info(self, name: str, original: str) -> TensorInfo | None:
        """The tensor as a blueprint has it; None for what is no tensor."""
        ...

    def inner(self, name: str) -> Iterable[tuple[TensorInfo, object]]:
        """The tensors in an entry that is no tensor, each with what is equal for two that are the same."""
        ...


Entry = StateDictTensor | InertEntry


@value_class
class StateDictModule:
    """What is known of a module besides its keys.

    `origin` is its path in the file, wherever edits have moved it; None for one that the file does not have. `version`
    is that of the class of a new module. `info` describes a new module, but for its path, as long as its keys are not
    renamed, `brief` is it in a few words, and `made` is that module for whoever can use it: one that stands at several
    paths is one object.
    """

    origin: str | None
    version: int | None = None
    info: ModuleInfo | None = None
    brief: str | None = None
    made: Any = None


#: A module with its path and its own entries, by their names in it.
Part = tuple[str, StateDictModule, Iterable[tuple[str, Entry]]]


@dataclass(frozen=True)
class NewModule:
    """A module that an edit puts in: its modules in order, each with its path in it; it in a few words, and how many
    parameters it has. `identities` is how many distinct tensors it brings."""

    parts: tuple[Part, ...]
    brief: str
    params: int
    identities: int


@dataclass(frozen=True)
class StateDictModel:
    """The entries by their keys, and the modules that the keys tell of.

    Modules stand before what is below them, each with all of that behind it. Entries stand in the order of their
    modules; those of one module parameters first, then buffers, then all others.
    """

    entries: Mapping[str, Entry]
    modules: Mapping[str, StateDictModule]

    @cached_property
    def tensors(self) -> dict[str, StateDictTensor]:
        """The plain tensors by their keys: parameters and buffers, without inert entries."""
        return {name: entry for name, entry in self.entries.items() if isinstance(entry, StateDictTensor)}

    @cached_property
    def inert(self) -> dict[str, InertEntry]:
        """The entries that are no plain tensors."""
        return {name: entry for name, entry in self.entries.items() if not isinstance(entry, StateDictTensor)}

    @cached_property
    def keys(self) -> list[str]:
        """The keys in the order of PyTorch's `state_dict()`: inert entries behind what is below their module."""
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
        """The model as a blueprint. Types and settings are known only of modules that edits have put in."""
        paths: dict[int, str] = {}
        modules = tuple(_module_info(path, module, paths) for path, module in self.modules.items())
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
        return Blueprint(modules, (*tensors, *self._inner_rows()))

    def _inner_rows(self) -> Iterator[TensorInfo]:
        """The tensors in entries that are no tensors."""
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
        """What each tensor shows of a storage."""
        found = {}
        for name, tensor in self.tensors.items():
            has_bytes = tensor.source is not None and tensor.elements
            storage = tensor.storage if has_bytes else None
            found[name] = Shown(tensor.identity, storage, *(tensor.byte_span if has_bytes else (0, 0)))
        return found

    def with_sources(self, sources: Mapping[object, Source]) -> StateDictModel:
        """The model with other bytes for some storages, which are of the dtypes that their tensors have."""
        entries = dict(self.entries)
        for name, tensor in self.tensors.items():
            if tensor.source is not None and (source := sources.get(tensor.storage)) is not None:
                entries[name] = replace(tensor, source=source, cast_from=())
        return StateDictModel(entries, self.modules)

    @cached_property
    def next_identity(self) -> int:
        """A number that no tensor has for its identity, nor any greater one."""
        return 1 + max((tensor.identity for tensor in self.tensors.values()), default=0)

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
        """The modules at these paths with their entries; those below `old` come below `new`."""
        for path in paths:
            own = ((split_key(name)[1], self.entries[name]) for name in self.own_entries[path])
            yield (path if old == new else new + path[len(old) :]), self.modules[path], own

    @cached_property
    def _behind(self) -> dict[str, int]:
        """The place in the order of modules behind each module and all that is below it."""
        found: dict[str, int] = {}
        open_modules: list[str] = []
        for place, path in enumerate(self.modules):
            while open_modules and not _is_below(path, open_modules[-1]):
                found[open_modules.pop()] = place
            open_modules.append(path)
        return found | dict.fromkeys(open_modules, len(self.modules))

    def with_modules(self, new: Mapping[str, NewModule]) -> StateDictModel:
        """The model with new modules in the place of those at these paths, none of which lies below another."""

        def parts() -> Iterator[Part]:
            paths, place = self._paths, 0
            while place < len(paths):
                path = paths[place]
                if path in new:
                    yield from _placed(new[path], path)
                    place = self._behind[path]
                else:
                    yield from self._parts([path])
                    place += 1

        return assembled(parts())

    def with_children(
        self, holder: str, children: Mapping[str, str | NewModule], names: Mapping[str, str] | None = None
    ) -> StateDictModel:
        """The model with these children of a module, in this order: modules that it has, by their paths, or new ones.

        `names` gives the module's own entries other names.
        """
        paths = self._paths
        start, stop = self._order[holder], self._behind[holder]
        renamed = names or {}

        def parts() -> Iterator[Part]:
            yield from self._parts(paths[:start])
            for path, module, own in self._parts([holder]):
                yield path, module, ((renamed.get(name, name), entry) for name, entry in own)
            for name, child in children.items():
                there = joined(holder, name)
                if isinstance(child, NewModule):
                    yield from _placed(child, there)
                else:
                    first = self._order[child]
                    yield from self._parts(paths[first : self._behind[child]], child, there)
            yield from self._parts(paths[stop:])

        return assembled(parts())

    def names_below(self, path: str) -> Iterator[str]:
        """The keys of all entries at and below a module, in their order."""
        paths = self._order
        for place in range(paths[path], self._behind[path]):
            yield from self.own_entries[self._paths[place]]

    @cached_property
    def _paths(self) -> list[str]:
        return list(self.modules)

    @cached_property
    def _order(self) -> dict[str, int]:
        return {path: place for place, path in enumerate(self.modules)}

    def by_identity(self, names: Iterable[str]) -> dict[int, StateDictTensor]:
        """The distinct tensors of these keys."""
        tensors = self.tensors
        return {tensors[name].identity: tensors[name] for name in names}

    def with_tensors(
        self, changed: Callable[[StateDictTensor], StateDictTensor], names: Iterable[str]
    ) -> StateDictModel:
        """The model with the tensors of these keys changed, under all the names that they have."""
        new = {identity: changed(tensor) for identity, tensor in self.by_identity(names).items()}
        entries: dict[str, Entry] = {
            name: new.get(entry.identity, entry) if isinstance(entry, StateDictTensor) else entry
            for name, entry in self.entries.items()
        }
        return StateDictModel(entries, self.modules)


def of_entries(
    entries: Mapping[str, Entry], known: Callable[[str], StateDictModule] = StateDictModule
) -> StateDictModel:
    """The model with these entries: modules and their children in the order in which the keys first tell of them.

    `known` gives what is known of the module at a path; by default it is the module of that path in the file.
    """
    own: dict[str, list[str]] = {}
    mixed: set[str] = set()  # the modules whose own entries are not parameters alone
    for name, entry in entries.items():
        path = split_key(name)[0]
        if path in own:
            own[path].append(name)
        else:
            own[path] = [name]
        if not isinstance(entry, StateDictTensor) or entry.kind != "parameter":
            mixed.add(path)
    ordered: dict[str, Entry] = {}
    modules: dict[str, StateDictModule] = {}
    for path in depth_first(tree_of(own)):
        modules[path] = known(path)
        names = own.get(path, ())
        for name in sorted(names, key=lambda name: _rank(entries[name])) if path in mixed else names:
            ordered[name] = entries[name]
    return StateDictModel(ordered, modules)


def _rank(entry: Entry) -> int:
    """The order of a module's own entries: parameters, buffers, all others."""
    if not isinstance(entry, StateDictTensor):
        return 2
    return 0 if entry.kind == "parameter" else 1


def _placed(new: NewModule, there: str) -> Iterator[Part]:
    """The modules of a new one at a path."""
    for path, module, own in new.parts:
        yield (joined(there, path) if path else there), module, own


def assembled(parts: Iterable[Part]) -> StateDictModel:
    """The model of these modules in this order, each with its path and its own entries by their names in it."""
    entries: dict[str, Entry] = {}
    modules: dict[str, StateDictModule] = {}
    for path, module, own in parts:
        modules[path] = module
        for name, entry in own:
            entries[joined(path, name)] = entry
    return StateDictModel(entries, modules)


def split_key(name: str) -> tuple[str, str]:
    """The path of the module that holds a key, and its own name; a leading dot belongs to that, as in `.weight`."""
    if name.startswith("."):
        return "", name  # a module without a name could not be told from the root
    path, _, own = name.rpartition(".")
    return path, own


def _is_below(path: str, above: str) -> bool:
    return not above or path.startswith(f"{above}.")


def _module_info(path: str, module: StateDictModule, paths: dict[int, str]) -> ModuleInfo:
    """A module as a blueprint has it; `paths` gets the first path of each that an edit has put in."""
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
