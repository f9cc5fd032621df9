"""Inert values: the content of a pickle as plain data. Nothing is imported, called or executed to make them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modelcli.checkpoints.storage import Storage
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import value_class


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. It is never looked up."""

    module: str
    name: str

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}"


@value_class
class StorageRef:
    """A storage that a pickle refers to by a persistent id.

    Attributes:
        span: the bytes.
        dtype: the dtype of its elements; None for raw bytes.
        count: the number of its elements.
        offset: the element of `span` at which it starts; torch before 0.4 saved views of storages.
        is_meta: whether it was saved from the meta device, so that its tensors have no values.
    """

    span: Storage
    dtype: str | None
    count: int
    offset: int = 0
    is_meta: bool = False

    @property
    def item(self) -> int:
        """The size of an element in bytes."""
        return 1 if self.dtype is None else ITEM_BYTES[self.dtype]


@dataclass(eq=False, slots=True)
class Opaque:
    """An object as the steps that would make it: `call(*args)`, then its items, appended values and state."""

    call: Any
    args: Any
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)
    appended: list[Any] = field(default_factory=list)
    how: str = "reduce"


class OrderedDict(dict[Any, Any]):
    """A `collections.OrderedDict`; `state` holds the attributes that the pickle sets on it."""

    state: dict[str, Any] | None = None


def described(value: Any) -> str:
    """Return what a value is, for an error message: the name of a class, or what made an object."""
    if isinstance(value, Opaque):
        return f"an object made by {described(value.call)}"
    return value.dotted if isinstance(value, Global) else type(value).__name__


def sizes_in(value: Any) -> Any:
    """Return the sizes inside a `torch.Size`; any other value unchanged."""
    if isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.dotted == "torch.Size":
        (value,) = value.args
    return value
