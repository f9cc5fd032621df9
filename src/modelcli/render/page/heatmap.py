"""Arrange the relative L2 differences of tensors as a table: a row for each layer, a column for each kind of tensor."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelcli.values.differences import Distance

#: A page shows at most this many rows and columns.
MOST_ROWS, MOST_COLUMNS = 200, 40
_NUMBER = re.compile(r"\d+", re.ASCII)
_NUMBERED = re.compile(r".*?[_-]\d+", re.ASCII | re.DOTALL)


def place_of(name: str) -> tuple[str, str]:
    """Return the layer of a tensor, and its kind: `model.layers.3` and `mlp.up_proj.weight`.

    The layer ends at the first number in the name (`blocks.0`, `layer_0`), and further numbers are one kind
    (`experts.*.weight`). Without a number the layer is the module that holds the tensor.
    """
    parts = name.split(".")
    for pattern in (_NUMBER, _NUMBERED):
        for position, part in enumerate(parts[:-1]):
            if pattern.fullmatch(part):
                rest = ["*" if _NUMBER.fullmatch(each) else each for each in parts[position + 1 :]]
                return ".".join(parts[: position + 1]), ".".join(rest)
    return ".".join(parts[:-1]), parts[-1]


@dataclass(frozen=True)
class Heatmap:
    """The differences by layer and kind.

    Attributes:
        rows, columns: the layers, and the kinds of tensors.
        cells: the largest relative L2 difference of the tensors of one layer and kind; NaN if one of them is NaN.
            Without an entry if there are none.
        left_out: how many rows and columns are left out, because there are too many.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[str, str], float]
    left_out: tuple[int, int] = (0, 0)


def heatmap(distances: Mapping[str, Distance | None]) -> Heatmap:
    """Return the heatmap of tensors whose values were compared, given the distance of each; None for equal values.

    Rows and columns are in the order of the names. If there are too many, those with the largest differences stay, and
    of columns without a difference those with the most tensors.
    """
    cells: dict[tuple[str, str], float] = {}
    counts: Counter[str] = Counter()
    for name, distance in distances.items():
        place = place_of(name)
        relative = 0.0 if distance is None else distance.relative
        if place not in cells or not relative <= cells[place]:  # NaN counts as larger
            cells[place] = relative
        counts[place[1]] += 1
    most_of_row: dict[str, float] = {}
    most_of_column: dict[str, float] = {}
    for (row, column), relative in cells.items():
        size = math.inf if math.isnan(relative) else relative
        most_of_row[row] = max(most_of_row.get(row, 0.0), size)
        most_of_column[column] = max(most_of_column.get(column, 0.0), size)
    rows = _largest(most_of_row, MOST_ROWS, Counter())
    columns = _largest(most_of_column, MOST_COLUMNS, counts)
    left_out = len(most_of_row) - len(rows), len(most_of_column) - len(columns)
    return Heatmap(rows, columns, cells, left_out)


def _largest(sizes: Mapping[str, float], most: int, counts: Counter[str]) -> list[str]:
    """Return the names with the largest sizes, in their order."""
    if len(sizes) <= most:
        return list(sizes)
    kept = set(sorted(sizes, key=lambda name: (-sizes[name], -counts[name]))[:most])
    return [name for name in sizes if name in kept]


def level_of(relative: float) -> str:
    """Return the style of a cell: `h0` to `h9` for 1e-5 and less to 1 and more, on a logarithmic scale."""
    if not math.isfinite(relative):
        return "odd"
    if relative == 0:
        return "same"
    return f"h{min(max(round(1.8 * (math.log10(relative) + 5)), 0), 9)}"
