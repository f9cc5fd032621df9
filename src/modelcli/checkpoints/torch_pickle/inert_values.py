"""Plain values that stand for what a pickle would make: nothing in them is imported, called or executed."""

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
    """A persistent id: the bytes of a storage, `count` elements of `dtype` (None for raw bytes).

    `offset` is where it starts in them, in elements: torch before 0.4 saved views of storages. `is_meta` says that it
    was saved from the meta device, so that torch gives no tensor in it any numbers.
    """

    span: Storage
    dtype: str | None
    count: int
    offset: int = 0
    is_meta: bool = False

    @property
    def item(self) -> int:
        """The bytes of an element."""
        return 1 if self.dtype is None else ITEM_BYTES[self.dtype]


@dataclass(eq=False, slots=True)
class Opaque:
    """An object that is kept as what it was made from: `call(*args)`, then items, appended values and state."""

    call: Any
    args: Any
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)
    appended: list[Any] = field(default_factory=list)
    how: str = "reduce"


class OrderedDict(dict[Any, Any]):
    """`collections.OrderedDict`, with the attributes that were set on it."""

    state: dict[str, Any] | None = None


def described(value: Any) -> str:
    if isinstance(value, Opaque):
        return f"what {described(value.call)} made"
    return value.dotted if isinstance(value, Global) else type(value).__name__


def sizes_in(value: Any) -> Any:
    """What stands for a shape or a stride, `torch.Size` taken off."""
    if isinstance(value, Opaque) and isinstance(value.call, Global) and value.call.dotted == "torch.Size":
        (value,) = value.args
    return value
