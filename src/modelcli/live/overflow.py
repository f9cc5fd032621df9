"""Values of a live model that a cast to a narrower dtype could not hold."""

from __future__ import annotations

from torch import nn

from modelcli.live import value_entries
from modelcli.live.sources import named_tensors
from modelcli.values import overflow


def notes_of(module: nn.Module) -> list[str]:
    """A line for each dtype that values of a live model did not fit into, after its bytes have been written."""
    return overflow.notes_of(list(value_entries.plain(named_tensors(module)).items()))
