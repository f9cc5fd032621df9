"""Edits: operations on a model, each a frozen dataclass and one line of text.

An edit has one module here, without torch, and one in `modelcli.live.surgery` that applies it to a live model; it is
registered by one line in `registry`. `edits.Replace` and the other classes can be imported from here. Everything is
imported on first use, so listing the names imports no edit.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modelcli.edits.registry import class_called, find, names, own_names, usable

if TYPE_CHECKING:
    from modelcli.edits.base import Edit
    from modelcli.edits.lines import from_words, kind_called, kind_of, parse, parse_all
    from modelcli.edits.words import checked_operand, split_words

#: The module of each name that is imported on first use.
_LATER = {
    "Edit": "base",
    **dict.fromkeys(("from_words", "kind_called", "kind_of", "parse", "parse_all"), "lines"),
    **dict.fromkeys(("checked_operand", "split_words"), "words"),
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
    "split_words",
    "usable",
]
