"""The values of a model's tensors: where they are, how they read, what they come to, whether all are finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelcli.checkpoints import CompositeEntry, TensorEntry
from modelcli.commands.look import Look, stdout_is_for_data

if TYPE_CHECKING:
    from modelcli.values.statistics import Statistics


@stdout_is_for_data
def values(found: Look, names: Sequence[str], *, whole: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of tensors: as nested lists where `whole`, and as one line each."""
    from modelcli.values import printed

    return printed.collect(_plain(entries_of(found, names)), whole=whole, what=_what(found))


@stdout_is_for_data
def stats(found: Look, names: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, Statistics]:
    """Statistics of the values of tensors, by name: see `values.statistics.collect`.

    `progress` is called with how many bytes are done, and how many there are.
    """
    from modelcli.values import statistics

    return statistics.collect(_plain(entries_of(found, names)), progress, _what(found))


@stdout_is_for_data
def not_finite(found: Look, names: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, Statistics]:
    """How many NaNs and infinities tensors have, by name, quantized and sparse ones in the parts they are made of.

    Left out are tensors whose values nothing gives. `progress` is called with how many bytes are done, and how many
    there are.
    """
    from modelcli.values import composites, statistics

    entries = entries_of(found, names)
    counts = statistics.not_finite(_plain(entries), progress, _what(found))
    made_of_parts = {name: entry for name, entry in entries.items() if isinstance(entry, CompositeEntry)}
    return counts | composites.not_finite(made_of_parts)


def entries_of(found: Look, names: Sequence[str] | None = None) -> Mapping[str, TensorEntry | CompositeEntry]:
    """Where the values of tensors are, by name: of all, or of those of `names`. Tensors without values are left out."""
    if found.keys is not None:
        entries = found.keys.entries()
        return entries if names is None else {name: entries[name] for name in names if name in entries}
    if found.live is not None:
        from modelcli.live import value_entries

        return value_entries.of_live(found.live, names)
    assert found.contents is not None
    rows = found.contents.rows
    return rows if names is None else {name: rows[name] for name in names if name in rows}


def _plain(entries: Mapping[str, TensorEntry | CompositeEntry]) -> dict[str, TensorEntry]:
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorEntry)}


def _what(found: Look) -> str:
    """What a model is called whose tensors show far more than its file has."""
    if found.live is not None or found.keys is not None or found.contents is None:
        return "the model"
    return f"{found.contents.path}: what its tensors view"
