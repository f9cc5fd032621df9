"""One tensor of a checkpoint, as it was read: its shape, its dtype, and where its bytes lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from modelcli.checkpoints.storage import Storage
from modelcli.model.tensors import Kind, Shape, TensorInfo, value_class


@value_class
class TensorEntry:
    """One tensor of a checkpoint: a view into a storage, which is a span of the file or of several.

    `offset` and `stride` count elements. Tensors with the same `storage` are tied or views of one another.
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
        """Equal for two tensors that are the same part of the same storage; None where there is nothing to share."""
        # A storage that two tensors share is one object: that is what makes them tied.
        return (id(self.storage), self.offset, self.shape, self.stride, self.dtype) if self.storage.nbytes else None


@dataclass(frozen=True, slots=True)
class CompositeEntry:
    """One tensor of a checkpoint that is no view into one storage: quantized, sparse, or on the meta device.

    `parts` are the plain tensors that it is made of: of a quantized one its whole numbers (and scales and zero points,
    where each channel has its own), of a sparse one its indices and values. `made_by` is the inert call that makes it,
    as it is written again; it is None where torch has no such dtype, and the one part is its bytes.
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
        """Equal for two tensors that are made of the same parts; None where there is nothing to share."""
        views = tuple(part.view for part in self.parts)
        return (self.layout, self.dtype, self.shape, *views) if any(views) else None


def info_of(
    name: str, entry: TensorEntry | CompositeEntry, original: str, known_kind: Kind | None = None
) -> TensorInfo:
    """An entry as a blueprint has it; `original` is the first name of the same tensor.

    Where no kind is known, the name and the dtype tell it.
    """
    is_trained = entry.is_parameter or bool(entry.requires_grad)
    guessed: Kind = "parameter" if is_trained or not looks_like_buffer(name, entry.dtype) else "buffer"
    # A state dict's tensors are detached: of them only a flag that is set says something.
    requires_grad = entry.requires_grad if is_trained else None
    tied_to = None if original == name else original
    kind, layout = known_kind or guessed, entry.layout
    return TensorInfo(
        name, entry.shape, entry.dtype, kind, requires_grad, tied_to, layout=layout, stored_bytes=entry.stored_bytes
    )


def looks_like_buffer(name: str, dtype: str) -> bool:
    """Whether a tensor of a bare checkpoint is a buffer: normalisation statistics, and what cannot be trained."""
    return (name.endswith(_STATISTICS) and name.rpartition(".")[2] in _STATISTICS) or not dtype.startswith(_TRAINABLE)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
#: How the dtypes begin that a parameter may have: a quantized weight is one, a whole number is not.
_TRAINABLE = ("float", "bfloat", "complex", "bcomplex", "qint", "quint")
