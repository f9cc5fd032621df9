"""Edits: one surgical operation each, as a frozen dataclass and as one line of text.

An edit has one module here, without torch, and one in `modelcli.live.surgery` that carries it out on a live model; the
line in `registry` is all that others need to find it. `edits.Replace` and the other classes are found here as well.
Everything here is imported when it is asked for: who wants the names alone needs no edit.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modelcli.edits.registry import class_called, find, names, own_names, usable

if TYPE_CHECKING:
    from modelcli.edits.base import Edit
    from modelcli.edits.lines import from_words, kind_called, kind_of, parse, parse_all
    from modelcli.edits.words import checked_operand, split

#: Which module has what is imported when it is asked for.
_LATER = {
    "Edit": "base",
    **dict.fromkeys(("from_words", "kind_called", "kind_of", "parse", "parse_all"), "lines"),
    **dict.fromkeys(("checked_operand", "split"), "words"),
}


def __getattr__(name: str) -> Any:
    if (module := _LATER.get(name)) is not None:
        return getattr(importlib.import_module(f"modelcli.edits.{module}"), name)
    if (found := class_called(name)) is not None:
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Edit",
    "checked_operand",
    "find",
    "from_words",
    "kind_called",
    "kind_of",
    "names",
    "own_names",
    "parse",
    "parse_all",
    "split",
    "usable",
]
