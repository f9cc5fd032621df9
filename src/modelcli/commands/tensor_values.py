"""The values of a model's tensors: their sources, their text, their statistics, and whether all are finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelcli.checkpoints import CompositeEntry, TensorEntry
from modelcli.commands.look import Look, stdout_is_for_data

if TYPE_CHECKING:
    from modelcli.values.statistics import Statistics


@stdout_is_for_data
def values(found: Look, names: Sequence[str], *, whole: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of tensors as one line each, and with `whole` as nested lists."""
    from modelcli.values import printed

    return printed.collect(_plain(entries_of(found, names)), whole=whole, what=_what(found))


@stdout_is_for_data
def stats(found: Look, names: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, Statistics]:
    """Return statistics of the values of tensors, by name: see `values.statistics.collect`.

    `progress` is called with the bytes done and the bytes in total.
    """
    from modelcli.values import statistics

    return statistics.collect(_plain(entries_of(found, names)), progress, _what(found))


@stdout_is_for_data
def not_finite(found: Look, names: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, Statistics]:
    """Count the NaNs and infinities of tensors, by name; of quantized and sparse ones in their parts.

    Tensors without values are left out. `progress` is called with the bytes done and the bytes in total.
    """
    from modelcli.values import composites, statistics

    entries = entries_of(found, names)
    counts = statistics.not_finite(_plain(entries), progress, _what(found))
    made_of_parts = {name: entry for name, entry in entries.items() if isinstance(entry, CompositeEntry)}
    return counts | composites.not_finite(made_of_parts)


def entries_of(found: Look, names: Sequence[str] | None = None) -> Mapping[str, TensorEntry | CompositeEntry]:
    """Return the source of the values of all tensors, or of `names`, by name. Tensors without values are left out."""
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
    """Return the name of a model for the error that its tensors need far more memory than its file has bytes."""
    if found.live is not None or found.keys is not None or found.contents is None:
        return "the model"
    return f"{found.contents.path}: what its tensors view"
