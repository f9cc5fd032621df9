"""Handle the entries of a state dict that are not plain tensors, depending on the format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelcli.checkpoints import CompositeEntry, formats
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque
from modelcli.errors import RequestError
from modelcli.wording import listed


def is_empty(value: Any) -> bool:
    """Whether an entry is empty, so that leaving it out loses nothing, such as the empty `_extra_state` of a module."""
    if isinstance(value, Opaque):
        return value.call in _EMPTIES and not any((*_as_tuple(value.args), value.appended, value.items, value.state))
    return value is None or (isinstance(value, str | bytes | dict | list | tuple) and not value)


def _as_tuple(args: Any) -> tuple[Any, ...]:
    return args if isinstance(args, tuple) else (args,)


#: The calls that make an empty container if they have no arguments or empty ones.
_EMPTIES = frozenset(
    Global(module, name)
    for module, names in (
        ("builtins", ("set", "bytearray", "bytes")),
        ("__builtin__", ("set", "bytearray", "bytes")),
        ("collections", ("Counter",)),
        ("_codecs", ("encode",)),
    )
    for name in names
)


def belongs_to_model(name: str, value: Any) -> bool:
    """Whether an entry that is not a plain tensor is part of the model."""
    return isinstance(value, CompositeEntry) or name.endswith("_extra_state")


def left_out_note(extras: Mapping[str, Any], kind: str) -> list[str]:
    """Return the note about empty entries that a format without Python values leaves out."""
    empty = [name for name, value in extras.items() if is_empty(value)]
    if not empty:
        return []
    what = "is empty and was" if len(empty) == 1 else "are empty and were"
    return [f"{listed(empty, 3)} {what} left out: {formats.named(kind).label} stores only tensors"]


def refusal_of_values(extras: Mapping[str, Any], kind: str) -> RequestError:
    """Return the error for entries that a format cannot store: values that are not tensors, or unsupported dtypes."""
    name, label = min(extras), formats.named(kind).label
    if isinstance(value := extras[name], CompositeEntry):
        what = value.dtype if value.layout == "strided" else value.layout
        where = "" if value.parts or value.stored_bytes else " on the meta device"
        message = f"{name} is {what}{where}, which {label} does not support"
    else:
        message = f"{name} is not a tensor, but {label} stores only tensors"
    return RequestError(message, formats.instead())
