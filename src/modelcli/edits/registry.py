"""The registry of edits: one line for each. An edit's module is imported on first use.

Other packages add edits by an entry point of the group `modelcli.edits`, whose name is that of the edit and whose value
is its class: `clamp = "my_package.clamp:Clamp"`. Entry points are read only for a name that is not here, and to list
all names.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from modelcli.errors import SystemFailureError

if TYPE_CHECKING:
    from modelcli.edits.base import Edit
    from modelcli.plug_ins import PlugIn

#: The class of each edit, in the order in which the help lists them.
_EDITS: Mapping[str, str] = {
    "replace": "modelcli.edits.replace:Replace",
    "wrap": "modelcli.edits.wrap:Wrap",
    "set": "modelcli.edits.set:Set",
    "add": "modelcli.edits.add:Add",
    "insert": "modelcli.edits.insert:Insert",
    "append": "modelcli.edits.append:Append",
    "remove": "modelcli.edits.remove:Remove",
    "slice": "modelcli.edits.slice:Slice",
    "extract": "modelcli.edits.extract:Extract",
    "rename": "modelcli.edits.rename:Rename",
    "split": "modelcli.edits.split:Split",
    "concat": "modelcli.edits.concat:Concat",
    "stack": "modelcli.edits.stack:Stack",
    "unstack": "modelcli.edits.unstack:Unstack",
    "permute": "modelcli.edits.permute:Permute",
    "reshape": "modelcli.edits.reshape:Reshape",
    "graft": "modelcli.edits.graft:Graft",
    "freeze": "modelcli.edits.freeze:Freeze",
    "unfreeze": "modelcli.edits.unfreeze:Unfreeze",
    "init": "modelcli.edits.init:Init",
    "cast": "modelcli.edits.cast:Cast",
    "dequantize": "modelcli.edits.dequantize:Dequantize",
    "tie": "modelcli.edits.tie:Tie",
    "untie": "modelcli.edits.untie:Untie",
    "resize": "modelcli.edits.resize:Resize",
    "fuse": "modelcli.edits.fuse:Fuse",
}


def find(name: str) -> type[Edit] | None:
    """Return the class of the edit with this name; None if neither modelcli nor another package has it.

    Raises SystemFailureError where another package registers it and it cannot be used, or where several packages do.
    """
    if (where := _EDITS.get(name)) is not None:
        return _own(where)
    from modelcli import plug_ins

    plug_in = plug_ins.find(plug_ins.EDITS, name)
    return None if plug_in is None else _loaded(plug_in)


def names() -> list[str]:
    """Return the names of all edits: those of modelcli, then those of other packages."""
    from modelcli import plug_ins

    return [*_EDITS, *(name for name in plug_ins.registered(plug_ins.EDITS) if name not in _EDITS)]


def own_names() -> list[str]:
    """Return the names of modelcli's own edits, without reading entry points."""
    return list(_EDITS)


def usable() -> Iterator[type[Edit]]:
    """Return the class of each edit, without those of other packages that cannot be loaded."""
    for name in names():
        with contextlib.suppress(SystemFailureError):
            if (found := find(name)) is not None:
                yield found


def class_called(name: str) -> type[Edit] | None:
    """Return modelcli's own class of this name: `Replace`."""
    edit = next((edit for edit, where in _EDITS.items() if where.endswith(f":{name}")), None)
    return None if edit is None else find(edit)


@functools.cache
def _own(where: str) -> type[Edit]:
    module, _, attribute = where.partition(":")
    found: type[Edit] = getattr(importlib.import_module(module), attribute)
    return found


@functools.cache
def _loaded(plug_in: PlugIn) -> type[Edit]:
    """Return the class of another package's edit. Raises SystemFailureError if it is not a complete declaration."""
    from modelcli.edits.base import Edit
    from modelcli.edits.declaring import Operand

    found = plug_in.load()
    if not isinstance(found, type) or not issubclass(found, Edit):
        raise plug_in.unusable(f"cannot be used: {plug_in.value} is no subclass of modelcli.edits.Edit")
    plug_in.require_texts(found, "name", "summary", "handler", "panel")
    if found.name != plug_in.name:
        raise plug_in.unusable(f"cannot be used: {plug_in.value} calls itself {found.name}")
    plug_in.require_tuples(found, "examples", "also_called")
    plug_in.require_tuples(found, "words", of=Operand)
    if "__dataclass_fields__" not in vars(found):
        raise plug_in.unusable(
            f"cannot be used: {plug_in.value} is no dataclass (@dataclass(frozen=True, kw_only=True))"
        )
    for method in ("from_operands", "operands"):
        if not any(method in vars(base) for base in found.__mro__[: found.__mro__.index(Edit)]):
            raise plug_in.unusable(f"cannot be used: {plug_in.value} has no {method}")
    return found


def forget() -> None:
    """Forget the edits of other packages, so that they are searched for again."""
    from modelcli import plug_ins

    _loaded.cache_clear()
    plug_ins.forget()
