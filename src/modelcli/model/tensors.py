"""A parameter or a buffer as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Literal, TypeVar, dataclass_transform

from modelcli.model.dtypes import ITEM_BYTES, is_differentiable

_T = TypeVar("_T")

Shape = tuple[int, ...]


Kind = Literal["parameter", "buffer"]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value_class(cls: type[_T]) -> type[_T]:
    """Make a dataclass whose instances must not be changed, for things of which a file may have 100,000.

    Only the type checker enforces that. `frozen=True` would enforce it at run time too, but makes creating an instance
    three times slower.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


@value_class
class TensorInfo:
    """One parameter or buffer under one name.

    Attributes:
        name: the key in the state dict.
        shape: None for a lazy parameter that has no shape before the first forward pass.
        dtype: torch's name of the dtype, without `torch.`.
        kind: `parameter` or `buffer`.
        requires_grad: None if it is not known (a buffer, a plain state dict).
        tied_to: the first name of the same tensor, if this is another name of it.
        persistent: whether the tensor is in the state dict.
        layout: torch's name of the layout (`strided`, `sparse_coo`).
        stored_bytes: the size in bytes if it is not `elements` times the element size: for a sparse tensor with its
            indices, for a quantized one with its scales.
    """

    name: str
    shape: Shape | None
    dtype: str
    kind: Kind = "parameter"
    requires_grad: bool | None = None
    tied_to: str | None = None
    persistent: bool = True
    layout: str = "strided"
    stored_bytes: int | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape) if self.shape is not None else 0

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype] if self.stored_bytes is None else self.stored_bytes

    @property
    def is_differentiable(self) -> bool:
        """Whether its dtype allows a gradient, so that it can be trained."""
        return is_differentiable(self.dtype)

    @property
    def is_trained(self) -> bool | None:
        """Whether the parameter is trainable; None if it could be and its flag is not known."""
        return self.requires_grad if is_differentiable(self.dtype) else False

    @property
    def identity(self) -> str:
        """The same name for all names of a tied tensor."""
        return self.name if self.tied_to is None else self.tied_to  # a name may be empty
