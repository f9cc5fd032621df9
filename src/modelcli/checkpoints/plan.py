"""The plan of a checkpoint to write: names, shapes, and where the bytes come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from modelcli.checkpoints.entries import CompositeEntry
from modelcli.checkpoints.storage import FileId, Span
from modelcli.model.tensors import Shape, value_class


class Source(Protocol):
    """Where the bytes of a storage come from: a span of a file, or new values. Equal sources count as one storage."""

    @property
    def nbytes(self) -> int: ...

    def files(self) -> Iterable[FileId]:
        """The files that the bytes are read from; none if they are in memory."""
        ...

    def chunks(self) -> Iterator[bytes | memoryview]: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PlannedStorage:
    """A storage that is an entry itself: all bytes of a source, as elements of `dtype` (None for raw bytes)."""

    dtype: str | None
    source: Source


@value_class
class PlannedTensor:
    """One tensor to write: a view of a storage, with offset and stride in elements.

    In a plan for a format without `holds_views`, it is row-major and uses all of its source.
    """

    shape: Shape
    dtype: str
    stride: Shape
    offset: int
    source: Source

    @property
    def view(self) -> tuple[object, ...]:
        """A key that two tensors share if they are the same view of the same storage."""
        return (self.source, self.offset, self.shape, self.stride, self.dtype)


@dataclass(frozen=True)
class Plan:
    """A checkpoint to write.

    Attributes:
        tensors: the plain tensors of the state dict, in order.
        record: the text of the record.
        metadata: the `_metadata` of the state dict.
        extras: its other entries as inert values; quantized and sparse tensors are `CompositeEntry`s.
        tree: the training checkpoint that contains the state dict, as inert values, if any.
        key: the path of the state dict in `tree`.
        texts: the texts to keep in the `__metadata__` of a safetensors file.
        order: the names of tensors and extras in their order, if the tensors do not come first.
        notes: notes for the user.
        companions: the files beside the weights if the checkpoint is the folder of a library's model, such as its
            configuration. A folder with a single file of weights then has no index, as the library writes it.
        whole_for: the library that reads all weights in a folder from one file, so that no shards are made; else empty.
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
    whole_for: str = ""

    @cached_property
    def first_names(self) -> dict[str, str]:
        """The first name of each tensor, by each of its names. Formats that write a tied tensor once use the first."""
        spans = [tensor.source for tensor in self.tensors.values() if isinstance(tensor.source, Span)]
        if len({(span.offset, span.identity) for span in spans}) == len(self.tensors):
            return dict(zip(self.tensors, self.tensors, strict=True))  # none starts where another one does
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
    """The file or folder that was written. `nbytes` is its size, for a folder that of all its files."""

    path: Path
    format: str
    tensors: int
    nbytes: int
    is_folder: bool = False
    notes: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The reference to it: a folder gets a slash at the end, because a bare word would name a builder."""
        return f"{self.path}/" if self.is_folder else str(self.path)
