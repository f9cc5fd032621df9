"""What a writer is fed with: names, shapes, and sources of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from modelcli.checkpoints.entries import CompositeEntry
from modelcli.checkpoints.storage import FileId
from modelcli.model.tensors import Shape


class Source(Protocol):
    """Where a storage's bytes come from: a span of a file, or a value just made. Equal sources are one storage."""

    @property
    def nbytes(self) -> int: ...

    def files(self) -> Iterable[FileId]:
        """The files that the bytes are read from; none where they are in memory already."""
        ...

    def chunks(self) -> Iterator[bytes | memoryview]: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PlannedStorage:
    """A storage that stands by itself: all bytes of a source, as elements of `dtype` (None for raw bytes)."""

    dtype: str | None
    source: Source


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor to write: a view (offset and stride in elements) into a storage.

    Of a plan for a format without `holds_views`, it is row-major and all of its source.
    """

    shape: Shape
    dtype: str
    stride: Shape
    offset: int
    source: Source

    @property
    def view(self) -> tuple[object, ...]:
        """Equal for two tensors that are the same part of the same storage."""
        return (self.source, self.offset, self.shape, self.stride, self.dtype)


@dataclass(frozen=True)
class Plan:
    """A checkpoint to write.

    `tensors` is the state dict, in order; `extras` its entries that are no plain tensors, inert: those that are made
    of others are `CompositeEntry`s; `metadata` its `_metadata`; `record` the text that says where the model comes
    from. `texts` are those of a safetensors file's `__metadata__` that are kept. `tree` and `key` are the training
    checkpoint around the state dict, as inert values, where there is one. `order` has the names of tensors and extras
    in theirs, where that is not tensors first. `notes` are what there is to tell whoever asked for it.
    `companions` are the files beside the weights where the checkpoint is the folder of a library's model, such as its
    configuration: then a folder with a single file of weights has no index, as the library writes it.
    """

    tensors: Mapping[str, PlannedTensor]
    record: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    tree: Any = None
    key: tuple[str | int, ...] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    companions: Mapping[str, Source] | None = None

    @cached_property
    def first_names(self) -> dict[str, str]:
        """The first name of each tensor by its name: a format that holds a tied one once writes it under that."""
        first: dict[tuple[object, ...], str] = {}
        return {
            name: first.setdefault(tensor.view if tensor.source.nbytes else (name,), name)
            for name, tensor in self.tensors.items()
        }

    @property
    def entries(self) -> dict[str, Any]:
        """The whole state dict, in order."""
        both = {**self.tensors, **self.extras}
        return {name: both[name] for name in self.order} | both

    @property
    def composites(self) -> dict[str, CompositeEntry]:
        """The tensors among the extras."""
        return {name: value for name, value in self.extras.items() if isinstance(value, CompositeEntry)}


@dataclass(frozen=True)
class Written:
    """What was written where; `nbytes` is the size of the file, or of all files of a folder."""

    path: Path
    format: str
    tensors: int
    nbytes: int
    is_folder: bool = False

    @property
    def reference(self) -> str:
        """As a command takes it: a folder's name ends in a slash, since a word alone is a builder's."""
        return f"{self.path}/" if self.is_folder else str(self.path)
