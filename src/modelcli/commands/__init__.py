"""What a command does, from the words it was given to a value that can be shown: one file a use case.

`targets` finds the model, `looking` describes it, `editing` changes and writes it, `loading` starts a recipe. Each is
imported when a name of it is asked for: a look at a file has no use for the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelcli.commands.editing import Outcome, Writing, edit, save, script
    from modelcli.commands.loading import Loaded, load
    from modelcli.commands.looking import (
        LOOKS_LIKE,
        Look,
        builders,
        built,
        cache_key,
        known_blueprint,
        likeness_notes,
        look,
        select_tensors,
        sort_tensors,
        stats,
        stdout_is_for_data,
        torchinfo_table,
        values,
        warm,
        without_record,
    )
    from modelcli.commands.targets import (
        Batch,
        Target,
        find_batch,
        find_target,
        names_model,
        options_given,
        recipe_locked,
        seen_from,
        undo,
    )

__all__ = [
    "LOOKS_LIKE",
    "Batch",
    "Loaded",
    "Look",
    "Outcome",
    "Target",
    "Writing",
    "builders",
    "built",
    "cache_key",
    "edit",
    "find_batch",
    "find_target",
    "known_blueprint",
    "likeness_notes",
    "load",
    "look",
    "names_model",
    "options_given",
    "recipe_locked",
    "save",
    "script",
    "seen_from",
    "select_tensors",
    "sort_tensors",
    "stats",
    "stdout_is_for_data",
    "torchinfo_table",
    "undo",
    "values",
    "warm",
    "without_record",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("looking", "targets", "editing", "loading"):
            found = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
