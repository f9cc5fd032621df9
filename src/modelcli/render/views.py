"""A view: one JSON document, and how its rows are read as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


def text(value: Any) -> str:
    """Any value in a cell: `-` for none, `yes` and `no` for truth."""
    if value is None or value == "":
        return "-"
    if value is True:
        return "yes"
    if value is False:
        return "no"
    return str(value)


def count(value: int | None) -> str:
    """`61,100,840`."""
    return "-" if value is None else f"{value:,}"


def compact(value: int | None) -> str:
    """`9,408`, `61.1M`, `17.6G`: from 10,000 on three digits and a unit (k is a thousand, then M, G, T, P)."""
    if value is None or abs(value) < 10_000:
        return count(value)
    rounded = float(f"{value:.3g}")
    power = next(power for power in (15, 12, 9, 6, 3) if abs(rounded) >= 10**power)
    scaled = rounded / 10**power
    return f"{scaled:.{max(0, 2 - len(str(int(abs(scaled)))) + 1)}f}{_UNITS[power]}"


_UNITS = {3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}


def signed(value: int | None) -> str:
    """`-4,056,030`; `0` stays `0`."""
    return "-" if value is None else f"{value:+,}" if value else "0"


def megabytes(value: int | None) -> str:
    """`244.40 MB`, where a megabyte is 10^6 bytes; less than 0.01 MB with all its digits."""
    if value is None:
        return "-"
    return f"{value / 1e6:.6f} MB" if 0 < value < 10_000 else f"{value / 1e6:,.2f} MB"


def whole_numbers(value: Any) -> str | None:
    """`[1,3,224,224]` for a list of whole numbers, which is JSON as well; None for anything else."""
    return str(value).replace(" ", "") if type(value) is list and set(map(type, value)) == {int} else None


def shape(value: Any) -> str:
    """`[1,3,224,224]`; `{out:[1,21,520,520]}` and `([1,2],[1,3])` for an output of several tensors."""
    if (sizes := whole_numbers(value)) is not None:  # the commonest first: a checkpoint may have 100,000
        return sizes
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{shape(item)}" for key, item in value.items()) + "}"
    if all(isinstance(item, int) for item in value):
        return "[" + ",".join(map(str, value)) + "]"
    return "(" + ",".join(map(shape, value)) + ")"


def finding(value: Any) -> str:
    """What was found or wanted, as text: `61,100,840`, `[1,10]`, words as they are."""
    return count(value) if isinstance(value, int) else value if isinstance(value, str) else shape(value)


def number(value: float | None) -> str:
    """`-0.0173`, `3.2e-05`: three significant digits; of whole numbers below 10^9 all, so that a cell stays narrow."""
    if value is None or (isinstance(value, int) and abs(value) < 10**9):
        return count(value)
    return f"{value:.3g}"


@dataclass(frozen=True)
class Share:
    """So many out of so many: a program reads the count (`str`), a person the share (`percent`)."""

    part: int
    whole: int

    def __str__(self) -> str:
        return str(self.part)


@dataclass(frozen=True)
class Bytes:
    """Bytes before and after, where the number of parameters stays: a program reads 0, the change of that number."""

    before: int
    after: int

    def __str__(self) -> str:
        return "0"


def percent(value: Share | None) -> str:
    """`12.50%`; `0%` and `100%` are exact, what comes close is `<0.01%` and `>99.99%`."""
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
    """A share as a bar of at most `BAR_CELLS`; any share above zero has at least the thinnest line."""
    if value is None or not value.whole or not value.part:
        return ""
    eighths = max(round(8 * BAR_CELLS * value.part / value.whole), 1)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


@dataclass(frozen=True)
class Column:
    """One column: the key of the rows it shows, and how.

    On a terminal that is too narrow the `optional` columns are left out, the highest number first. Then `flexible` ones
    are cut, each in its own way (`cut`), the `vital` ones last. Where not even that is enough, the `spare` columns
    are left out, the highest number first. None of it happens anywhere else, and what is only for the eye (`on_screen`)
    is not shown anywhere else. `screen_format` is how a terminal shows the values, where that is another way than
    `format`.
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
    """A column of paths: it is cut last, and keeps the end of each path."""
    return Column(key, title, style="cyan", flexible=True, vital=True, cut="path")


@dataclass(frozen=True)
class Branch:
    """A line of a tree: its guide lines, its label, its configuration, and the rest.

    On a terminal that is too narrow it is the configuration that gives way.
    """

    guide: str
    label: str
    config: str = ""
    rest: str = ""


@dataclass(frozen=True)
class View:
    """What a command shows: a table of `rows`, or a `body` that is text already (a printed model), or a `tree`.

    `above` are lines of text that come before the table. `folded` is how many modules have no row of their own, because
    they stand in that of their run. `dimmed` and `alarming` say which rows a terminal shows dim, and which in red.
    Where `nested`, the rows are modules in the model's order: a terminal that has no room for their paths indents the
    last names of these.
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
