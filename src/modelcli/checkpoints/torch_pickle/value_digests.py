"""Digests of values that were never unpickled, so that two can be compared; the values of tensors do not count."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable
from typing import Any

from modelcli.checkpoints.limits import room_for_nesting
from modelcli.checkpoints.torch_pickle.composite_tensors import is_tensor
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict, StorageRef

#: So much of a value is shown in a line.
_MOST_SHOWN = 60


def form_of(value: Any) -> bytes:
    """A digest of the form of a value: equal for two that say the same, whatever is in their tensors.

    The order of a dict's keys says nothing, nor does whether a value stands at two places or an equal one at each.
    """
    with room_for_nesting():
        return _Forms().of(value)


class _Forms:
    """The forms of values that may stand in one another at many places: each is made once."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}

    def of(self, value: Any) -> bytes:
        if is_tensor(value):
            return _digest("tensor")
        if not isinstance(value, dict | list | tuple | Opaque):
            return _digest(type(value).__name__, _leaf(value))
        if id(value) not in self._known:
            self._known[id(value)] = _digest("what it lies in")  # until it is known: a value may hold itself
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
    """A value in a few words, for a person."""
    return _shorter.repr(value)


class _Short(reprlib.Repr):
    """`repr` of inert values, cut where they are long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 4, 4, 4
        self.maxstring = self.maxother = _MOST_SHOWN

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
