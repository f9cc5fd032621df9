"""What a command does, from the words it was given to a value that can be shown.

`targets` find the model, `looking` says what it is made of, `editing` changes and writes it, `loading` starts a recipe.
"""

from modelcli.session.editing import Outcome, Writing, edit, save, script
from modelcli.session.loading import Loaded, load
from modelcli.session.looking import (
    LOOKS_LIKE,
    Look,
    builders,
    cache_key,
    known_blueprint,
    likeness_notes,
    look,
    select_tensors,
    sort_tensors,
    stats,
    stdout_is_for_data,
    values,
    warm,
)
from modelcli.session.targets import Batch, Target, find_batch, find_target, names_model, options_given, seen_from, undo

__all__ = [
    "LOOKS_LIKE",
    "Batch",
    "Loaded",
    "Look",
    "Outcome",
    "Target",
    "Writing",
    "builders",
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
    "save",
    "script",
    "seen_from",
    "select_tensors",
    "sort_tensors",
    "stats",
    "stdout_is_for_data",
    "undo",
    "values",
    "warm",
]
