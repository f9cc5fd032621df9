"""A view: what a command shows, as a JSON document and as the rows and columns of a table.

The functions of this module format single values as the text of cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


def text(value: Any) -> str:
    """Return any value as the text of a cell: `-` for None and empty text, `yes` and `no` for booleans."""
    if value is None or value == "":
        return "-"
    if value is True:
        return "yes"
    if value is False:
        return "no"
    return str(value)


def count(value: int | None) -> str:
    """Return `61,100,840`, or `-` for None."""
    return "-" if value is None else f"{value:,}"


def compact(value: int | None) -> str:
    """Return `9,408`, `61.1M`, `17.6G`: three digits and a decimal unit (k, M, G, T, P) from 10,000 on."""
    if value is None or abs(value) < 10_000:
        return count(value)
    rounded = float(f"{value:.3g}")
    power = next(power for power in (15, 12, 9, 6, 3) if abs(rounded) >= 10**power)
    scaled = rounded / 10**power
    return f"{scaled:.{max(0, 2 - len(str(int(abs(scaled)))) + 1)}f}{_UNITS[power]}"


_UNITS = {3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}


def signed(value: int | None) -> str:
    """Return a difference with its sign: `-4,056,030`, `+520`, `0`."""
    return "-" if value is None else f"{value:+,}" if value else "0"


def megabytes(value: int | None) -> str:
    """Return a number of bytes in megabytes of 10^6 bytes: `244.40 MB`. Less than 0.01 MB shows six decimals."""
    if value is None:
        return "-"
    return f"{value / 1e6:.6f} MB" if 0 < value < 10_000 else f"{value / 1e6:,.2f} MB"


def whole_numbers(value: Any) -> str | None:
    """Return `[1,3,224,224]` for a list of integers (this text is JSON too), or None for any other value."""
    return str(value).replace(" ", "") if type(value) is list and set(map(type, value)) == {int} else None


def shape(value: Any) -> str:
    """Return a shape as text.

    Args:
        value: a list of sizes (`[1,3,224,224]`); for several tensors, a mapping of shapes (`{out:[1,21,520,520]}`) or
            a list of shapes (`([1,2],[1,3])`); None gives `-`.
    """
    if (sizes := whole_numbers(value)) is not None:  # the most frequent case first: there may be 100,000
        return sizes
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{shape(item)}" for key, item in value.items()) + "}"
    if all(isinstance(item, int) for item in value):
        return "[" + ",".join(map(str, value)) + "]"
    return "(" + ",".join(map(shape, value)) + ")"


def finding(value: Any) -> str:
    """Return what a check found or expected, as text: `61,100,840`, `[1,10]`, and text unchanged."""
    return count(value) if isinstance(value, int) else value if isinstance(value, str) else shape(value)


def number(value: float | None) -> str:
    """Return three significant digits of a number: `-0.0173`, `3.2e-05`. Integers below 10^9 show all their digits."""
    if value is None or (isinstance(value, int) and abs(value) < 10**9):
        return count(value)
    return f"{value:.3g}"


@dataclass(frozen=True)
class Share:
    """A part of a whole. Formats for programs show the count (`str`), formats for people the share (`percent`)."""

    part: int
    whole: int

    def __str__(self) -> str:
        return str(self.part)


@dataclass(frozen=True)
class Bytes:
    """The bytes before and after a change that keeps the number of parameters.

    Formats for programs show that number's change, which is 0.
    """

    before: int
    after: int

    def __str__(self) -> str:
        return "0"


def percent(value: Share | None) -> str:
    """Return `12.50%`. `0%` and `100%` are exact; shares close to them give `<0.01%` and `>99.99%`."""
    if value is None or not value.whole:
        return "-"
    if value.part in (0, value.whole):
        return "100%" if value.part else "0%"
    share = 100 * value.part / value.whole
    return "<0.01%" if share < 0.01 else ">99.99%" if share > 99.99 else f"{share:.2f}%"


#: The width of a full bar, in terminal cells.
BAR_CELLS = 10
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(value: Share | None) -> str:
    """Return a share as a bar of at most BAR_CELLS terminal cells. Any share above zero shows at least a thin line."""
    if value is None or not value.whole or not value.part:
        return ""
    eighths = max(round(8 * BAR_CELLS * value.part / value.whole), 1)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    On a terminal that is too narrow, first the `optional` columns are left out, the highest number first. If
    cutting cells cannot make the table fit, the `spare` columns are left out, the highest number first. Then the cells
    of `flexible` columns are cut, those of `vital` ones last. Other outputs leave nothing out and cut nothing.

    Attributes:
        key: the key of the value in each row.
        title: the header.
        format: returns the text of a value.
        right: whether the cells are aligned to the right.
        style: a Rich style.
        optional: above 0, the column may be left out; see above.
        flexible: whether its cells may be cut.
        vital: whether its cells are cut only after those of other flexible columns.
        cut: which part of a cell is cut.
        spare: above 0, the column may be left out; see above.
        on_screen: whether only a terminal shows the column, such as a bar.
        screen_format: replaces `format` on a terminal.
    """

    key: str
    title: str
    format: Callable[[Any], str] = text
    right: bool = False
    style: str = ""
    optional: int = 0
    flexible: bool = False
    vital: bool = False
    cut: Literal["end", "middle", "path"] = "end"
    spare: int = 0
    on_screen: bool = False
    screen_format: Callable[[Any], str] | None = None


def path_column(key: str, title: str) -> Column:
    """Return a column of module or tensor paths. It is cut last, and a cut path keeps its end."""
    return Column(key, title, style="cyan", flexible=True, vital=True, cut="path")


@dataclass(frozen=True)
class Branch:
    """A line of a tree: its guide lines, its label, its configuration, and the rest.

    On a terminal that is too narrow, the configuration is cut first.
    """

    guide: str
    label: str
    config: str = ""
    rest: str = ""


@dataclass(frozen=True)
class View:
    """What a command shows: a table of `rows`, or a `body` that is text already (a printed model), or a `tree`.

    Attributes:
        document: the JSON document.
        rows: the rows of the table, by the keys of the columns.
        columns: the columns of the table.
        footer: labels and texts below the table.
        header: whether the table has a header.
        above: lines of text before the table.
        body: text that is shown instead of a table.
        tree: lines that are shown instead of a table.
        dimmed: whether a terminal shows a row dimmed.
        alarming: whether a terminal shows a row in red.
        nested: whether the rows are modules in the model's order. If a terminal has no room for their paths, it shows
            the last component of each, indented.
        folded: how many modules have no row of their own because one row stands for several modules.
    """

    document: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[Column]
    footer: Sequence[tuple[str, str]] = ()
    header: bool = True
    above: Sequence[str] = ()
    body: str | None = None
    tree: Sequence[Branch] | None = None
    dimmed: Callable[[Mapping[str, Any]], bool] | None = None
    alarming: Callable[[Mapping[str, Any]], bool] | None = None
    nested: bool = False
    folded: int = 0
