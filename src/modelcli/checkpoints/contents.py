"""What was read from a checkpoint, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from modelcli import providers
from modelcli.checkpoints import limits
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry, info_of
from modelcli.checkpoints.record import DamagedError, Record, RecordOfKeys
from modelcli.model.blueprint import Blueprint, ModuleInfo, from_keys
from modelcli.model.tensors import Kind, TensorInfo
from modelcli.wording import listed

#: A layer of one tensor in a module of its own, as adapters have them, comes to three.
_MODULES_OF_A_TENSOR = 4


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint holds.

    `tensors` is the state dict; `extras` its entries that are no tensors; `metadata` its `_metadata`. `tree` is the
    whole of a training checkpoint as inert values, and `key` the path of the state dict in it (None where the file is
    nothing but a state dict). `foreign` are the names of classes and functions outside the allow-list; none was
    looked up. `notes` are for a person. `types` are the class names of a pickled module, by path, and `kinds` says
    which of its tensors are parameters and which are buffers. `texts` is what
    safetensors' `__metadata__` holds beside what modelcli wrote there. `order` has the names of tensors and extras as
    they stand in the file, where there are both.

    `inner` are tensors that lie in `extras`, each named as Python reaches it. `unseen` are entries that torch makes
    tensors of, or in which something lies that only running code could tell from tensors, and that have no row;
    `hidden` are attributes of tensors in which tensors lie. Whoever vouches for the file has to say that these were not
    looked at.
    `is_program` says that the tensors belong to a program, whose code and constants are not kept.
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
    texts: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    inner: Mapping[str, TensorEntry | CompositeEntry] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    is_program: bool = False

    @cached_property
    def rows(self) -> Mapping[str, TensorEntry | CompositeEntry]:
        """All tensors that have a row: those of the state dict, and those in its other entries."""
        return {**self.tensors, **self.inner} if self.inner else self.tensors

    def without_record(self) -> Contents:
        """The same file as keys alone: what its record says of an architecture, edits and flags is left aside."""
        if self.record is None:
            return self
        note = f"the record in {self.path.name} is left aside: its architecture, edits and flags are not carried on"
        return replace(self, record=None, notes=(*self.notes, note))

    def with_record_of_keys(self, found: RecordOfKeys) -> Contents:
        """The same file with the record that its tensors make whole; a note says where they are others by now."""
        try:
            return replace(self, record=found.beside(self.infos(), self._pay_for_modules()))
        except DamagedError as error:
            return replace(self, notes=(*self.notes, f"the record in {self.path.name} was ignored: {error}"))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all entries of the state dict, in the order of the file."""
        return self.order or (*self.tensors, *self.extras)

    def without_objects(self) -> Contents:
        """The tensors and nothing else: what objects of foreign classes stood around them is dropped."""
        return replace(self, extras={}, metadata={}, record=None, tree=None, key=None, foreign=(), order=(), inner={})

    def infos(self) -> dict[str, TensorInfo]:
        """The tensors as a blueprint has them: ties found by storage, buffers told by their usual names."""
        budget = self._budget("the names of its tied tensors")
        first: dict[tuple[object, ...], str] = {}
        infos = {}
        shared = self._shared_storages()
        known_kinds = self.kinds
        for name, entry in self.rows.items():
            original = name
            if not isinstance(entry, TensorEntry) or (shared and id(entry.storage) in shared):
                view = entry.view
                original = first.setdefault(view, name) if view is not None else name
                if original is not name:
                    budget.spend(len(original))
            infos[name] = info_of(name, entry, original, known_kinds.get(name))
        for name in self.inner.keys() - self.tensors.keys():
            infos[name] = replace(infos[name], requires_grad=None)
        return infos

    def _shared_storages(self) -> set[int]:
        """The `id` of each storage that several plain tensors have; of 100,000 tensors hardly one has such."""
        uses = [id(entry.storage) for entry in self.rows.values() if isinstance(entry, TensorEntry)]
        return set() if len(set(uses)) == len(uses) else {use for use, times in Counter(uses).items() if times > 1}

    def bare_blueprint(self) -> Blueprint:
        """The tree of the key names; types are known only where the file names the classes of a pickled module."""
        return from_keys(self.infos().values(), self.types, self._pay_for_modules())

    def _pay_for_modules(self) -> Callable[[int], None]:
        """What pays for each module that names tell of, with the length of its path."""
        budget = self._budget("the modules in its names", times=_MODULES_OF_A_TENSOR)
        return lambda length: budget.spend(limits.ENTRY + length)

    def tensors_in_root(self) -> Blueprint:
        """The tensors in a root that holds no other module: enough where only tensors are shown."""
        root_type = self.types.get("")
        root = ModuleInfo("", root_type, () if root_type is None else (root_type,))
        return Blueprint((root,), tuple(self.infos().values()))

    def _budget(self, what: str, times: int = 1) -> limits.Budget:
        """What may be made of the names: as much as they take, so many times over."""
        names = (*self.rows, *self.types)
        nbytes = sum(map(len, names)) + limits.ENTRY * len(names)
        return limits.Budget(f"{self.path}: {what}", nbytes, times)


def foreign_names(names: Sequence[str], *, most: int) -> str:
    """Names of foreign classes and functions in a line: those that no tensor library has come first."""
    harmless = tuple(f"{package}." for package in ("torch", "numpy", "collections", *providers.packages()))
    ordered = sorted(names, key=lambda name: name.startswith(harmless))
    return listed(ordered, most)
