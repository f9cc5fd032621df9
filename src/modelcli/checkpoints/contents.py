"""The contents of a checkpoint, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from modelcli import providers
from modelcli.checkpoints import limits
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry, buffers_by_name, info_of
from modelcli.checkpoints.record import DamagedError, Record, RecordOfKeys
from modelcli.model.blueprint import Blueprint, ModuleInfo, from_keys
from modelcli.model.tensors import Kind, TensorInfo
from modelcli.wording import listed


@dataclass(frozen=True)
class Contents:
    """Everything that a checkpoint contains.

    Attributes:
        path: the file or folder.
        format: the name of its format.
        tensors: the tensors of the state dict.
        extras: its entries that are not tensors.
        metadata: its `_metadata`.
        record: the record, if the file has a valid one.
        tree: a whole training checkpoint as inert values; None if the file is only a state dict.
        key: the path of the state dict in `tree`.
        foreign: the names of classes and functions that are not on the allow-list. None of them was imported.
        notes: notes for the user.
        types: the class names of a pickled module's submodules, by path.
        kinds: which tensors are parameters and which are buffers, as far as the file tells.
        trained: which parameters are trained (True) and which are frozen (False), as far as the file tells.
        texts: the `__metadata__` of a safetensors file, without what modelcli wrote there.
        order: the names of tensors and extras in the order of the file, if there are extras.
        inner: the tensors inside `extras`, each under the name by which Python accesses it.
        unseen: entries without a row that are tensors when they are loaded, or may contain tensors. A check of all
            tensors has to report that it did not see these.
        hidden: attributes that contain tensors outside the state dict. Likewise.
        is_program: whether the tensors belong to a program, whose code and constants are not kept.
        is_remote: whether the values are on another machine, and only the headers of the files were read.
    """

    path: Path
    format: str
    tensors: Mapping[str, TensorEntry | CompositeEntry]
    extras: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    record: Record | None = None
    tree: Any = None
    key: tuple[str | int, ...] | None = None
    foreign: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    trained: Mapping[str, bool] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    inner: Mapping[str, TensorEntry | CompositeEntry] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    is_program: bool = False
    is_remote: bool = False

    @cached_property
    def rows(self) -> Mapping[str, TensorEntry | CompositeEntry]:
        """All tensors that get a row: those of the state dict, and those inside its other entries."""
        return {**self.tensors, **self.inner} if self.inner else self.tensors

    def without_record(self) -> Contents:
        """Return the contents without the record, so that the architecture, edits and flags in it are ignored."""
        if self.record is None:
            return self
        note = f"ignored the record in {self.path.name}, with its architecture, edits and flags"
        return replace(self, record=None, notes=(*self.notes, note))

    def with_record_of_keys(self, found: RecordOfKeys) -> Contents:
        """Return the contents with the record that its tensors complete, or with a note if they no longer match it."""
        try:
            return replace(self, record=found.beside(self.infos(), self.pay_for_modules()))
        except DamagedError as error:
            return replace(self, notes=(*self.notes, f"the record in {self.path.name} was ignored: {error}"))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all entries of the state dict, in the order of the file."""
        return self.order or (*self.tensors, *self.extras)

    def without_objects(self) -> Contents:
        """Return the contents with the tensors only, without the objects of foreign classes around them."""
        return replace(self, extras={}, metadata={}, record=None, tree=None, key=None, foreign=(), order=(), inner={})

    def infos(self) -> dict[str, TensorInfo]:
        """Return the tensors for a blueprint: ties by their storages, buffers by their usual names."""
        names = (*self.rows, *self.types)
        budget = limits.Budget(f"{self.path}: the names of its tied tensors", limits.size_of_names(names))
        first: dict[tuple[object, ...], str] = {}
        infos = {}
        shared = self._shared_storages()
        known_kinds = self.kinds
        buffers = buffers_by_name([*self.rows], [entry.dtype for entry in self.rows.values()])
        for name, entry in self.rows.items():
            original = name
            is_alone = isinstance(entry, TensorEntry) and not (shared and id(entry.storage) in shared)
            if is_alone and not entry.requires_grad and not entry.is_parameter:
                # As `info_of` would describe it, which takes twice as long: nearly all of 100,000 tensors are such.
                kind = known_kinds.get(name) or ("buffer" if name in buffers else "parameter")
                infos[name] = TensorInfo(name, entry.shape, entry.dtype, kind)
                continue
            if not is_alone:
                view = entry.view
                original = first.setdefault(view, name) if view is not None else name
                if original is not name:
                    budget.spend(len(original))
            infos[name] = info_of(name, entry, original, known_kinds.get(name))
        for name in self.inner.keys() - self.tensors.keys():
            infos[name] = replace(infos[name], requires_grad=None)
        for name, flag in self.trained.items():
            infos[name] = replace(infos[name], requires_grad=flag)
        return infos

    def _shared_storages(self) -> set[int]:
        """The `id` of each storage that several plain tensors have; of 100,000 tensors hardly one has such."""
        uses = [id(entry.storage) for entry in self.rows.values() if isinstance(entry, TensorEntry)]
        return set() if len(set(uses)) == len(uses) else {use for use, times in Counter(uses).items() if times > 1}

    def bare_blueprint(self) -> Blueprint:
        """Return the module tree that the keys describe. Types are known only for a pickled module."""
        return from_keys(self.infos().values(), self.types, self.pay_for_modules())

    def pay_for_modules(self) -> Callable[[int], None]:
        """Return a function that charges for a module that the names describe, given the length of its path."""
        return limits.pay_for_modules((*self.rows, *self.extras, *self.types), f"{self.path}: the modules in its names")

    def tensors_in_root(self) -> Blueprint:
        """The tensors in a root that holds no other module: enough where only tensors are shown."""
        root_type = self.types.get("")
        root = ModuleInfo("", root_type, () if root_type is None else (root_type,))
        return Blueprint((root,), tuple(self.infos().values()))


def foreign_names(names: Sequence[str], *, most: int) -> str:
    """Return the names of foreign classes and functions as a list for a message; suspicious ones come first."""
    harmless = tuple(f"{package}." for package in ("torch", "numpy", "collections", *providers.packages()))
    ordered = sorted(names, key=lambda name: name.startswith(harmless))
    return listed(ordered, most)
