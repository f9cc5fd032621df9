"""One tensor of a checkpoint, as it was read: its shape, its dtype, and where its bytes are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from modelcli.checkpoints.storage import Storage
from modelcli.model.tensors import Kind, Shape, TensorInfo, value_class


@value_class
class TensorEntry:
    """One tensor of a checkpoint: a view of a storage, which is a span of one file or of several.

    `offset` and `stride` count elements. Two tensors with the same `storage` object are tied or overlap.
    """

    shape: Shape
    dtype: str
    stride: Shape
    offset: int
    storage: Storage
    requires_grad: bool | None = None
    is_parameter: bool = False
    layout: ClassVar[str] = "strided"
    stored_bytes: ClassVar[int | None] = None

    @property
    def view(self) -> tuple[object, ...] | None:
        """A key that two tensors share if they are the same view of the same storage; None for an empty storage."""
        # Tied tensors share one storage object.
        return (id(self.storage), self.offset, self.shape, self.stride, self.dtype) if self.storage.nbytes else None


@dataclass(frozen=True, slots=True)
class CompositeEntry:
    """One tensor of a checkpoint that is not a view of one storage: quantized, sparse, or on the meta device.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        layout: torch's name of its layout.
        parts: the plain tensors that it consists of: the integers of a quantized tensor (and scales and zero points if
            each channel has its own), the indices and values of a sparse one.
        stored_bytes: the size of the parts in bytes.
        made_by: the inert call that makes it, which can be written again; None if torch does not have its dtype. Then
            its only part is its bytes.
        requires_grad: its flag; None if it is not known.
        is_parameter: whether it was saved as a parameter.
    """

    shape: Shape
    dtype: str
    layout: str
    parts: tuple[TensorEntry, ...]
    stored_bytes: int
    made_by: Any
    requires_grad: bool | None = None
    is_parameter: bool = False

    @property
    def view(self) -> tuple[object, ...] | None:
        """A key that two tensors share if they consist of the same parts; None if they have no bytes."""
        views = tuple(part.view for part in self.parts)
        return (self.layout, self.dtype, self.shape, *views) if any(views) else None


def info_of(
    name: str, entry: TensorEntry | CompositeEntry, original: str, known_kind: Kind | None = None
) -> TensorInfo:
    """Return an entry as a blueprint describes it.

    Args:
        name: its key.
        entry: the tensor.
        original: the first key of the same tensor.
        known_kind: its kind; None to guess it from its name and dtype.
    """
    is_trained = entry.is_parameter or bool(entry.requires_grad)
    guessed: Kind = "parameter" if is_trained or not looks_like_buffer(name, entry.dtype) else "buffer"
    # state_dict() detaches tensors, so only a flag that is set tells anything.
    requires_grad = entry.requires_grad if is_trained else None
    tied_to = None if original == name else original
    kind, layout = known_kind or guessed, entry.layout
    return TensorInfo(
        name, entry.shape, entry.dtype, kind, requires_grad, tied_to, layout=layout, stored_bytes=entry.stored_bytes
    )


def kind_by_name(name: str, dtype: str) -> Kind:
    """Return the kind of a tensor of a plain state dict, as `looks_like_buffer` guesses it."""
    return "buffer" if looks_like_buffer(name, dtype) else "parameter"


def buffers_by_name(names: Sequence[str], dtypes: Sequence[str]) -> set[str]:
    """Return the names of those of many tensors of which `looks_like_buffer` says that they are buffers.

    A file may have 100,000 tensors, but it has few dtypes, of which each is looked at once.
    """
    never_trained = {dtype for dtype in set(dtypes) if not dtype.startswith(_TRAINABLE)}
    found = {name for name in names if name.endswith(_STATISTICS) and name.rpartition(".")[2] in _STATISTICS}
    if never_trained:
        found |= {name for name, dtype in zip(names, dtypes, strict=True) if dtype in never_trained}
    return found


def looks_like_buffer(name: str, dtype: str) -> bool:
    """Whether a tensor of a plain state dict is probably a buffer: a normalisation statistic, or not differentiable."""
    return (name.endswith(_STATISTICS) and name.rpartition(".")[2] in _STATISTICS) or not dtype.startswith(_TRAINABLE)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
#: The beginnings of the dtypes that a parameter may have, including quantized ones.
_TRAINABLE = ("float", "bfloat", "complex", "bcomplex", "qint", "quint")
