"""The registry of edits: one line for each. An edit's module is imported on first use.

Other packages add edits by an entry point of the group `modelcli.edits`, whose name is that of the edit and whose value
is its class: `clamp = "my_package.clamp:Clamp"`. Entry points are read only for a name that is not here, and to list
all names.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from modelcli.errors import SystemFailureError

if TYPE_CHECKING:
    from modelcli.edits.base import Edit

#: The class of each edit, in the order in which the help lists them.
_EDITS: Mapping[str, str] = {
    "replace": "modelcli.edits.replace:Replace",
    "add": "modelcli.edits.add:Add",
    "insert": "modelcli.edits.insert:Insert",
    "append": "modelcli.edits.append:Append",
    "remove": "modelcli.edits.remove:Remove",
    "extract": "modelcli.edits.extract:Extract",
    "rename": "modelcli.edits.rename:Rename",
    "freeze": "modelcli.edits.freeze:Freeze",
    "unfreeze": "modelcli.edits.unfreeze:Unfreeze",
    "init": "modelcli.edits.init:Init",
    "cast": "modelcli.edits.cast:Cast",
}
ENTRY_POINTS = "modelcli.edits"


def find(name: str) -> type[Edit] | None:
    """Return the class of the edit with this name; None if neither modelcli nor another package has it.

    Raises SystemFailureError if another package registers it and it cannot be imported.
    """
    where = _EDITS.get(name) or _from_elsewhere().get(name)
    return None if where is None else _loaded(name, where)


def names() -> list[str]:
    """Return the names of all edits: those of modelcli, then those of other packages."""
    return [*_EDITS, *(name for name in _from_elsewhere() if name not in _EDITS)]


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
def _loaded(name: str, where: str) -> type[Edit]:
    from modelcli.edits.base import Edit

    module, _, attribute = where.partition(":")
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:  # whatever the module of another package may raise
        if name in _EDITS:
            raise
        raise SystemFailureError(f"the edit {name} cannot be loaded from {where}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, Edit) or found.name != name:
        raise SystemFailureError(f"the edit {name} cannot be loaded from {where}: that is no edit of this name")
    return found


@functools.cache
def _from_elsewhere() -> Mapping[str, str]:
    """Return the entry points of other packages' edits, by the names of the edits."""
    from importlib.metadata import entry_points

    return {point.name: f"{point.module}:{point.attr}" for point in entry_points(group=ENTRY_POINTS)}


def forget() -> None:
    """Forget the entry points, so that they are read again: a package may have been installed or removed."""
    _loaded.cache_clear()
    _from_elsewhere.cache_clear()
