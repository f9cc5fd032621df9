"""Values of a live model that a cast to a narrower dtype could not hold."""

from __future__ import annotations

from torch import nn

from modelcli.checkpoints.entries import TensorEntry
from modelcli.live import value_entries
from modelcli.live.sources import named_tensors
from modelcli.values import overflow
from modelcli.values.watch import Watch


def notes_of(module: nn.Module) -> list[str]:
    """A line for each dtype that values of a live model did not fit into, after its bytes have been written."""
    return overflow.notes_of(_entries(module))


def watches_of(module: nn.Module) -> list[Watch]:
    """What recorded, for each cast in order, whether a value did not fit."""
    return overflow.watches_of(_entries(module))


def _entries(module: nn.Module) -> list[tuple[str, TensorEntry]]:
    return list(value_entries.plain(named_tensors(module)).items())
