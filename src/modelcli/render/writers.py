"""Views onto a screen, into a pipe, as JSON, CSV and markdown."""

from __future__ import annotations

import csv
import io
import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelcli.render.views import Column, View

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("table", "json", "csv", "markdown")
MIN_FLEXIBLE = 12


def safe(text: str) -> str:
    """Text from a file with its control, escape and direction characters made visible: `\\x1b`."""
    if text.isprintable() and text.isascii():
        return text
    return "".join(character if _is_plain(character) else _escaped(character) for character in text)


def _is_plain(character: str) -> bool:
    return character.isprintable() and unicodedata.category(character) not in ("Cf", "Cc", "Cs", "Co")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def to_json(document: Mapping[str, Any]) -> str:
    """One JSON document on one line; numbers that JSON does not know are text."""
    try:
        return json.dumps(document, ensure_ascii=True, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(document), ensure_ascii=True, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def to_csv(view: View) -> str:
    """The rows with a header, numbers plain."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [column for column in view.columns if column.title]
    writer.writerow([column.key for column in columns])
    for row in view.rows:
        writer.writerow([_csv_cell(row.get(column.key)) for column in columns])
    return out.getvalue()


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple | Mapping):
        return json.dumps(value, separators=(",", ":"))
    return safe(str(value))


def to_markdown(view: View) -> str:
    """The rows as a markdown table."""
    columns = [column for column in view.columns if column.title]
    lines = ["| " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|" + "|".join(" ---: " if column.right else " --- " for column in columns) + "|")
    for row in view.rows:
        cells = [
            safe(column.format(row.get(column.key))).replace("\\", "\\\\").replace("|", "\\|") for column in columns
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(view: View) -> list[list[str]]:
    return [[safe(column.format(row.get(column.key))) for column in view.columns] for row in view.rows]


def _widths(view: View, cells: Sequence[Sequence[str]], measure: Callable[[str], int] = len) -> list[int]:
    titles = [column.title if view.header else "" for column in view.columns]
    return [max([measure(title), *(measure(row[index]) for row in cells)]) for index, title in enumerate(titles)]


def to_plain(view: View) -> str:
    """Aligned columns for a pipe: one line a row, nothing cut, no colour."""
    if view.body is not None:
        return "\n".join(safe(line) for line in view.body.split("\n")) + "\n"
    lines: list[str] = []
    if view.rows or view.header:
        cells = _cells(view)
        widths = _widths(view, cells)
        if view.header:
            lines.append(_line([column.title for column in view.columns], view.columns, widths))
        lines += [_line(row, view.columns, widths) for row in cells]
    if view.footer:
        if view.header:
            lines.append("")
        width = max(len(label) for label, _ in view.footer)
        lines += [f"{label + ':':<{width + 1}} {safe(value)}" for label, value in view.footer]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if column.right else cell.ljust(width)
        for cell, column, width in zip(cells, columns, widths, strict=True)
    ]
    return "  ".join(padded).rstrip()


def print_rich(view: View, console: Console) -> None:
    """A Rich table that fits the width of the terminal, and the footer below it."""
    from rich.text import Text

    if view.body is not None:
        console.print(Text("\n".join(safe(line) for line in view.body.split("\n"))), soft_wrap=True)
        return
    if view.rows or view.header:
        console.print(_rich_table(view, console.width))
    if view.footer:
        if view.header:
            console.print()
        width = max(len(label) for label, _ in view.footer)
        for label, value in view.footer:
            line = Text.assemble((f"{label + ':':<{width + 1}} ", "dim"), safe(value))
            console.print(line)


def _rich_table(view: View, width: int) -> Any:
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    cells = _cells(view)
    kept, widths, gap = _fit(view, _widths(view, cells, cell_len), width)
    table = Table(
        box=box.SIMPLE_HEAD if view.header else None,
        show_header=view.header,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1 if view.header else gap, 0, 0),  # the box of a header has a space between columns itself
        collapse_padding=True,
        header_style="bold",
    )
    for index in kept:
        column = view.columns[index]
        table.add_column(
            Text(column.title),
            justify="right" if column.right else "left",
            style=column.style,
            no_wrap=True,
            overflow="ellipsis",
            width=widths[index],
        )
    for row, texts in zip(view.rows, cells, strict=True):
        style = "dim" if view.dimmed is not None and view.dimmed(row) else None
        table.add_row(*(Text(texts[index]) for index in kept), style=style)
    return table


def _fit(view: View, widths: list[int], available: int) -> tuple[list[int], list[int], int]:
    """Which columns to show, how wide, and the gap between them: narrower gaps first, then fewer, then cut columns."""
    kept = list(range(len(widths)))
    widths = list(widths)

    def needed(gap: int) -> int:
        return sum(widths[index] for index in kept) + gap * (len(kept) - 1)

    while needed(1) > available:
        optional = [index for index in kept if view.columns[index].optional]
        if not optional:
            break
        kept.remove(max(optional, key=lambda index: view.columns[index].optional))
    flexible = [index for index in kept if view.columns[index].flexible]
    while needed(1) > available and any(widths[index] > MIN_FLEXIBLE for index in flexible):
        widest = max(flexible, key=lambda index: widths[index])
        widths[widest] -= 1
    excess = needed(1) - available
    if excess > 0 and kept:
        widest = max(kept, key=lambda index: widths[index])
        widths[widest] = max(MIN_FLEXIBLE, widths[widest] - excess)
    return kept, widths, 2 if needed(2) <= available else 1
