"""A parameter or a buffer as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, TypeVar, dataclass_transform

from modelcli.model.dtypes import ITEM_BYTES, is_differentiable

_T = TypeVar("_T")

Shape = tuple[int, ...]


Kind = Literal["parameter", "buffer"]


@dataclass_transform(frozen_default=True)
def value_class(cls: type[_T]) -> type[_T]:
    """A dataclass whose instances are never changed, for what a file may have 100,000 of.

    That nothing changes one is for the type checker to see: `frozen=True` sees to it at run time as well, and takes
    three times as long to make each.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


@value_class
class TensorInfo:
    """One parameter or buffer under one name.

    `shape` is None for a lazy parameter that no forward pass has given a shape yet. `requires_grad` is None where
    nothing says (a buffer, a bare checkpoint). `tied_to` is the first name of the same tensor. `layout` is torch's
    name for how it is stored; `stored_bytes` are what it takes where that is not its elements times their size: of a
    sparse tensor its indices and values, of a quantized one its scales as well.
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
        """Whether torch lets it have a gradient, and so be trained: whole numbers have none."""
        return is_differentiable(self.dtype)

    @property
    def is_trained(self) -> bool | None:
        """Whether a parameter is trained; None where nothing says that of one that could be."""
        return self.requires_grad if self.is_differentiable else False

    @property
    def identity(self) -> str:
        """One name for all the names of a tied tensor."""
        return self.name if self.tied_to is None else self.tied_to  # a name may be empty
