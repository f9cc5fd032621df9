"""Digests that show whether two inert values are equal, apart from the values of the tensors in them."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable
from typing import Any

from modelcli.checkpoints.limits import room_for_nesting
from modelcli.checkpoints.torch_pickle.composite_tensors import is_tensor
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef

#: The most characters of a text that a message shows.
_MAX_SHOWN = 60


def digest_of(value: Any) -> bytes:
    """Return a digest that two values share if they are equal apart from the values of tensors in them.

    The order of a dict's keys does not matter. It does not matter either whether a value is used twice or there are
    two equal values.
    """
    with room_for_nesting():
        return _Digests().of(value)


class _Digests:
    """The digests of values that may be used many times; each is computed once."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}

    def of(self, value: Any) -> bytes:
        if is_tensor(value):
            return _digest("tensor")
        if not isinstance(value, dict | list | tuple | Opaque):
            return _digest(type(value).__name__, _leaf(value))
        if id(value) not in self._known:
            self._known[id(value)] = _digest("a value that contains this one")  # a value may contain itself
            self._known[id(value)] = self._container(value)
        return self._known[id(value)]

    def _container(self, value: Any) -> bytes:
        match value:
            case dict():
                items = sorted(self.of(key) + self.of(item) for key, item in value.items())
                state = value.state if isinstance(value, OrderedDict) and value.state else None
                return _digest(type(value).__name__, *items, *(() if state is None else ("state", self.of(state))))
            case Opaque(call=Global(module="_codecs", name="encode"), args=(str() as text, "latin1" | "latin-1")):
                return self.of(text.encode("latin-1"))
            case Opaque(call=Global(name="set" | "frozenset" as name), args=tuple() as args):
                members = [*(args[0] if args and isinstance(args[0], list | tuple) else ()), *value.appended]
                return _digest(name, *sorted(map(self.of, members)))
            case Opaque():
                parts = (value.call, value.args, value.state, value.items, value.appended)
                return _digest("object", value.how, *map(self.of, parts))
        return _digest(type(value).__name__, *map(self.of, value))


def _leaf(value: Any) -> str:
    if isinstance(value, Global):
        return value.dotted.replace("__builtin__.", "builtins.")
    if isinstance(value, StorageRef):
        return f"{value.dtype} {value.count}"
    return value.hex() if isinstance(value, float) else repr(value)


def _digest(*parts: str | bytes) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()


def brief(value: Any) -> str:
    """Return a short text that shows a value."""
    return _shorter.repr(value)


class _Short(reprlib.Repr):
    """`repr` for inert values that shortens long ones."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 4, 4, 4
        self.maxstring = self.maxother = _MAX_SHOWN

    def repr1(self, x: Any, level: int) -> str:
        shown: Callable[[Any, int], str] = super().repr1
        if is_tensor(x):
            return f"tensor of shape {list(x.shape)}" if hasattr(x, "shape") else "tensor"
        if isinstance(x, Opaque):
            name = x.call.name if isinstance(x.call, Global) else "object"
            return f"{name}({'...' if x.args or x.appended or x.items else ''})"
        if isinstance(x, Global):
            return x.dotted
        return self.repr_dict(x, level) if isinstance(x, OrderedDict) else shown(x, level)


_shorter = _Short()
