"""Turn views into text: a Rich table for a terminal, aligned columns for a pipe, JSON, CSV and markdown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from modelcli.model.paths import ROOT
from modelcli.render.views import Branch, Column, View, whole_numbers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FORMATS = ("table", "json", "csv", "markdown")
#: The minimum width of a flexible column, in terminal cells.
MIN_FLEXIBLE = 12
#: The minimum width of a vital column, which is cut last, in terminal cells.
MIN_VITAL = 20
#: In a pipe, the cells of a column are padded to at most this many characters.
_MAX_FILLED = 256
#: How many rows of a long table or tree are written at once. Between two batches the program notices an interrupt or a
#: closed terminal.
BATCH = 100
#: The first of Unicode's private-use characters. Each is one terminal cell wide, and Rich gives no meaning to any.
_FIRST_MARK = 0xE000
_MARKS = re.compile(r"([\ue000-\uf8ff])\1*")
_COMPACT = json.JSONEncoder(separators=(",", ":"))


#: The ASCII characters that replace tree guides and bars on a terminal whose encoding lacks those.
_IN_ASCII = str.maketrans(
    {"├": "|", "└": "`", "─": "-", "│": "|"} | dict.fromkeys("█▉▊▋▌", "#") | dict.fromkeys("▍▎▏", ".")
)


def safe(text: str) -> str:
    """Return the text with control, escape and text-direction characters made visible: `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def to_json(document: Mapping[str, Any]) -> str:
    """Return a JSON document on one line. NaN and infinities, which JSON lacks, become strings."""
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
    """Return the rows as CSV with a header and plain numbers.

    Text that a spreadsheet would run as a formula gets a leading `'`.
    """
    keys = [column.key for column in _kept_in_text(view) if column.title]
    columns = [_csv_column([row.get(key) for row in view.rows]) for key in keys]
    rows = [",".join(cells) for cells in zip(*columns, strict=True)]
    if "" in rows:
        rows = [row or '""' for row in rows]
    return "\n".join([",".join(keys), *rows, ""])


#: The characters that begin a formula, halfwidth or fullwidth, with or without blanks before them.
_FORMULA = re.compile(r"\s*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")
#: A semicolon before such a character: spreadsheets of some countries separate cells with semicolons.
_FORMULA_IN_TEXT = re.compile(r";(?=[\s\"']*[=+\-@\uff1d\uff0b\uff0d\uff20])")
_CSV_NOT_PLAIN = re.compile(rf"[,;\"]|\A{_FORMULA.pattern}")
_CSV_SPECIAL = re.compile('[,;"]')


def _csv_column(values: list[Any]) -> list[str]:
    """Return the cells of a column. This is fast for 100,000 rows, because most columns repeat a few values."""
    kinds = set(map(type, values))
    if kinds in ({int}, {str}) and len(set(values)) > len(values) // 2:
        if kinds == {int}:
            return list(map(str, values))
        if _are_plain(values):
            return values
    return _format_distinct(_csv_cell, values)


def _format_distinct(formatter: Callable[[Any], str], values: list[Any]) -> list[str]:
    """Format the values of a column, calling `formatter` once for each distinct value."""
    kinds = set(map(type, values))
    if kinds == {list}:  # a list cannot be a dictionary key; its repr can, and tells `[1]` from `[True]`
        # Rows of one shape may have one list, which is looked at once.
        reprs = {number: repr(value) for number, value in dict(zip(map(id, values), values, strict=True)).items()}
        keys = [reprs[id(value)] for value in values]
        texts = {key: formatter(value) for key, value in dict(zip(keys, values, strict=True)).items()}
    elif len(kinds) == 1 and kinds <= {str, int, bool, type(None)}:
        keys = values
        texts = {value: formatter(value) for value in set(values)}
    else:
        return list(map(formatter, values))
    return list(map(texts.__getitem__, keys))


def _are_plain(texts: list[str]) -> bool:
    """Whether no text needs quoting or escaping in CSV. The names of nearly all tensors need none."""
    joined = "".join(texts)
    first = "".join([text[:1] for text in texts])
    is_special = any(character in joined for character in ',;"')  # ten times as fast as to search for _CSV_SPECIAL
    return all(texts) and first.isalnum() and joined.isprintable() and not is_special


def _csv_cell(value: Any) -> str:
    if type(value) is str:  # the most frequent type first: a checkpoint may have 100,000 rows
        return _csv_text(value)
    if type(value) is int:
        return str(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple | Mapping):
        return _csv_field(whole_numbers(value) or _COMPACT.encode(value))
    return _csv_field(str(value)) if isinstance(value, int | float) else _csv_text(str(value))


def _csv_text(text: str) -> str:
    """Return a cell that every spreadsheet shows as this text and does not run as a formula."""
    if text.isprintable() and not _CSV_NOT_PLAIN.search(text):  # the most frequent case
        return text
    marked = f"'{text}" if _FORMULA.match(text) else text
    return _csv_field(safe(_FORMULA_IN_TEXT.sub(";'", marked)))


def _csv_field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if _CSV_SPECIAL.search(text) else text


def _kept_in_text(view: View) -> list[Column]:
    """Return the columns for formats other than a terminal: all but those for the eye, such as bars."""
    return [column for column in view.columns if not column.on_screen]


def to_markdown(view: View) -> str:
    """Return the rows as a markdown table."""
    columns = [column for column in _kept_in_text(view) if column.title]
    lines = ["| " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|" + "|".join(" ---: " if column.right else " --- " for column in columns) + "|")
    cells = (_markdown_texts(_texts(view, column)) for column in columns)
    lines += ["| " + " | ".join(row) + " |" for row in zip(*cells, strict=True)]
    return "\n".join(lines) + "\n"


#: Characters that start markup at any position: a cell, code, HTML, a link, an image, emphasis, a formula.
_MARKDOWN = re.compile(r"[\\|`<\[!*~$@]")
#: Characters that start markup at some positions only: an underscore at the edge of a word, an entity, a URL.
_MARKDOWN_BY_POSITION = re.compile(r"_(?:(?![^\W_])|(?<![^\W_]_))|&(?=#?\w+;)|:(?=//)|\.(?<=www\.)", re.IGNORECASE)


def _markdown_texts(texts: Sequence[str]) -> list[str]:
    """Return the cells of a column, escaped so that rendered markdown shows these texts."""
    joined = _MARKDOWN.sub(r"\\\g<0>", "\n".join(texts))  # no text has a line break, so one call escapes all of them
    return _MARKDOWN_BY_POSITION.sub(r"\\\g<0>", joined).split("\n") if texts else []


def _texts(view: View, column: Column) -> list[str]:
    """Return the texts of a column's cells, from top to bottom."""
    texts = _format_distinct(column.format, [row.get(column.key) for row in view.rows])
    return texts if "".join(texts).isprintable() else [safe(text) for text in texts]


def to_plain(view: View, *, encoding: str = "utf-8") -> str:
    """Return aligned columns for a pipe: one line for each row, nothing cut, no colour."""
    if view.tree is not None:
        return "".join(f"{_guide(branch, encoding)}{_branch_text(branch)}\n" for branch in view.tree)
    if view.body is not None:
        return "\n".join(safe(line) for line in view.body.split("\n")) + "\n"
    columns = _kept_in_text(view)
    titles = [[column.title] if view.header else [] for column in columns]
    cells = [title + _texts(view, column) for title, column in zip(titles, columns, strict=True)]
    # Cells longer than _MAX_FILLED stick out. Padding all other rows to their length could take gigabytes.
    widths = [max((size for size in set(map(len, texts)) if size <= _MAX_FILLED), default=0) for texts in cells]
    fields = [f"%{'' if column.right else '-'}{width}s" for column, width in zip(columns, widths, strict=True)]
    line = "  ".join(fields)
    lines = [*map(safe, view.above), *((line % row).rstrip() for row in zip(*cells, strict=True))]
    if view.footer:
        if view.header:
            lines.append("")
        width = max(len(label) for label, _ in view.footer)
        lines += [f"{label + ':':<{width + 1}} {safe(value)}" for label, value in view.footer]
    return "\n".join(lines) + "\n"


def _branch_text(branch: Branch) -> str:
    return safe(f"{branch.label}{branch.config}{branch.rest}")


def _guide(branch: Branch, encoding: str) -> str:
    return branch.guide if _has_marks(encoding) else branch.guide.translate(_IN_ASCII)


def _has_marks(encoding: str) -> bool:
    """Whether an encoding has box-drawing lines, block characters and the ellipsis."""
    return encoding.lower().startswith("utf")


# --- on a terminal -------------------------------------------------------------------------------------------------


def print_rich(view: View, console: Console) -> list[str]:
    """Print a view as a Rich table that fits the width of the terminal, with the footer below it.

    Returns:
        The titles of the columns that were left out because the terminal is too narrow.
    """
    from rich.text import Text

    left_out: list[str] = []
    if view.tree is not None:
        for start in range(0, len(view.tree), BATCH):
            lines = (
                _branch_fitted(branch, console.width, console.encoding) for branch in view.tree[start : start + BATCH]
            )
            console.file.write("".join(f"{line}\n" for line in lines))
            console.file.flush()
        return left_out
    if view.body is not None:
        console.print(Text("\n".join(safe(line) for line in view.body.split("\n"))), soft_wrap=True)
        return left_out
    for above in view.above:
        console.print(Text(safe(above)), soft_wrap=True)
    if view.rows or view.header:
        left_out = _print_table(view, console)
    if view.footer:
        if view.header:
            console.print()
        width = max(len(label) for label, _ in view.footer)
        for label, value in view.footer:
            line = Text.assemble((f"{label + ':':<{width + 1}} ", "dim"), safe(value))
            console.print(line)
    return left_out


def _print_table(view: View, console: Console) -> list[str]:
    """Print the table with Rich, which takes half a millisecond for each row; `_stream_rows` prints long tables.

    Returns:
        The titles of the columns that were left out because the terminal is too narrow.
    """
    from rich.text import Text

    cells = [_shown_texts(view, column, console.encoding) for column in view.columns]
    full = _widths(view, cells)
    kept, widths, gap = _fit(view, full, console.width)
    path = next((index for index, column in enumerate(view.columns) if column.cut == "path"), None)
    if view.nested and path is not None and widths[path] < full[path]:
        return _print_table(_indented(view), console)
    for index in kept:
        cut = _CUTS[view.columns[index].cut]
        mark = _mark(console.encoding)
        cells[index] = [cut(text, widths[index], mark) for text in cells[index]]
    table = _empty_table(view, kept, widths, gap)
    # On an old Windows console Rich draws by system calls, so there are no bytes that could be written instead.
    if len(view.rows) > console.height and not console.legacy_windows and view.alarming is None:
        _stream_rows(view, cells, kept, table, console)
    else:
        for position, row in enumerate(view.rows):
            table.add_row(*(Text(cells[index][position]) for index in kept), style=_style(view, row))
        console.print(table)
    dropped = [index for index in range(len(view.columns)) if index not in kept and not view.columns[index].on_screen]
    return [view.columns[index].title for index in dropped if not {*cells[index]} <= {"-", ""}]


def _style(view: View, row: Mapping[str, Any]) -> str | None:
    if view.alarming is not None and view.alarming(row):
        return "red"
    return "dim" if view.dimmed is not None and view.dimmed(row) else None


def _indented(view: View) -> View:
    """Return the view with each path replaced by its last component, indented by the depth of the path."""
    key = next(column.key for column in view.columns if column.cut == "path")
    depths = [0 if row[key] == ROOT else row[key].count(".") + 1 for row in view.rows]
    top = min(depths, default=0)
    rows = [
        {**row, key: "  " * (depth - top) + (row[key].rpartition(".")[2] or row[key])}
        for depth, row in zip(depths, view.rows, strict=True)
    ]
    columns = [replace(column, cut="end") if column.key == key else column for column in view.columns]
    return replace(view, rows=rows, columns=columns, nested=False)


def _shown_texts(view: View, column: Column, encoding: str) -> list[str]:
    """Return the texts of a column's cells for a terminal, with escapes for characters that its encoding lacks."""
    texts = _texts(view, column if column.screen_format is None else replace(column, format=column.screen_format))
    if _has_marks(encoding):
        return texts
    if column.on_screen:
        return [text.translate(_IN_ASCII) for text in texts]
    return [_escaped(text, encoding) for text in texts]


def _escaped(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _mark(encoding: str) -> str:
    """Return the mark for text that was cut. It is one terminal cell wide."""
    return "…" if _has_marks(encoding) else "~"


def _fits(text: str, width: int) -> bool:
    from rich.cells import cell_len

    return (len(text) <= width and text.isascii()) or cell_len(text) <= width


def _cut_end(text: str, width: int, mark: str) -> str:
    """Cut the end of a text so that it takes at most `width` terminal cells."""
    from rich.cells import set_cell_size

    return text if _fits(text, width) else set_cell_size(text, max(width - 1, 0)).rstrip() + mark


def _cut_middle(text: str, width: int, mark: str) -> str:
    """Cut the middle of a text so that it takes at most `width` terminal cells; two thirds of them show its end."""
    from rich.cells import set_cell_size

    if _fits(text, width):
        return text
    head = set_cell_size(text, max(width - 1, 0) // 3).rstrip()
    rest = max(width - 1, 0) - width // 3
    tail = text[max(len(text) - rest, 0) :] if rest else ""
    while not _fits(head + mark + tail, width) and tail:
        tail = tail[1:]
    return _cut_end(head + mark + tail, width, mark)


def _cut_path(text: str, width: int, mark: str) -> str:
    """Shorten components of a path to their first letter and their number: `encoder.l….e…11.mlp.0.weight`.

    The components in the middle are shortened first, then the first one, so that rows can still be told apart. If the
    path is still too long, it is cut in the middle like any text.
    """
    from rich.cells import cell_len

    if _fits(text, width):
        return text
    parts = text.split(".")
    excess = cell_len(text) - width
    for index in (*range(1, len(parts) - 1), 0):
        short = _shortened(parts[index], mark)
        if len(parts) > 1 and len(short) < len(parts[index]):
            excess -= cell_len(parts[index]) - cell_len(short)
            parts[index] = short
        if excess <= 0:
            break
    return _cut_middle(".".join(parts), width, mark)


def _shortened(component: str, mark: str) -> str:
    found = _NUMBER_AT_END.fullmatch(component)
    return component if found is None else f"{found[1]}{mark}{found[2]}"


_NUMBER_AT_END = re.compile(r"(.).*?(\d*|\[[\d-]+\])", re.DOTALL)
_CUTS = {"end": _cut_end, "middle": _cut_middle, "path": _cut_path}


def _branch_fitted(branch: Branch, width: int, encoding: str) -> str:
    """Return a line of a tree that fits the terminal: first its configuration is cut, then its type and name."""
    from rich.cells import cell_len

    guide = _guide(branch, encoding)
    label, config, rest = (safe(text) for text in (branch.label, branch.config, branch.rest))
    if not _has_marks(encoding):
        label, config, rest = (_escaped(text, encoding) for text in (label, config, rest))
    mark = _mark(encoding)
    room = width - cell_len(guide + label + rest)
    if cell_len(config) > room:
        config = f"({_cut_end(config[1:-1], room - 2, mark)})" if room > MIN_FLEXIBLE else ""
    label = _cut_end(label, max(width - cell_len(guide + config + rest), 1), mark)
    return _cut_end(guide + label + config + rest, width, mark)


def _widths(view: View, cells: Sequence[Sequence[str]]) -> list[int]:
    """Return how many terminal cells each column takes if nothing is cut."""
    from rich.cells import cell_len

    titles = [column.title if view.header else "" for column in view.columns]
    return [
        max(cell_len(title), max(map(len if "".join(texts).isascii() else cell_len, texts), default=0))
        for title, texts in zip(titles, cells, strict=True)
    ]


def _empty_table(view: View, kept: Sequence[int], widths: Sequence[int], gap: int) -> Table:
    """Return a Rich table with the columns at the indexes `kept` and no rows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD if view.header else None,
        show_header=view.header,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1 if view.header else gap, 0, 0),  # a box with a header puts a space between columns itself
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
    return table


def _stream_rows(
    view: View, cells: Sequence[Sequence[str]], kept: Sequence[int], table: Table, console: Console
) -> None:
    """Write the table a batch of rows at a time. Rich lays out two rows; the others are formatted like them.

    So Rich still decides how a row looks (the colour system, NO_COLOR, a terminal too narrow for the columns).
    """
    layout = _laid_out(table, console)
    console.file.write(layout.above)
    is_dimmed = view.dimmed or (lambda _: False)
    for start in range(0, len(view.rows), BATCH):
        batch = slice(start, start + BATCH)
        dims = map(is_dimmed, view.rows[batch])
        fields = (
            _filled(cells[kept[field.column]][batch], field, right=view.columns[kept[field.column]].right)
            for field in layout.fields
        )
        rows = zip(dims, *fields, strict=True)
        lines = [(layout.dimmed if dim else layout.plain) % tuple(texts) for dim, *texts in rows]
        console.file.write("".join(lines))
        console.file.flush()


@dataclass(frozen=True)
class _Field:
    """A column of a row that Rich has laid out.

    Attributes:
        column: the number of the column in the table.
        width: its width in terminal cells.
        shown: how many of these cells are left of the terminal's edge.
    """

    column: int
    width: int
    shown: int


@dataclass(frozen=True)
class _Layout:
    """The text that Rich writes above the rows of a table, and a plain and a dimmed row with `%s` for each field."""

    above: str
    plain: str
    dimmed: str
    fields: tuple[_Field, ...]


def _laid_out(table: Table, console: Console) -> _Layout:
    """Find out how Rich lays out a table of these columns.

    Each cell is filled with a character of its own, so that Rich's output shows the position and the width of the cell.
    (On a very narrow terminal Rich makes columns narrower than they ask for, and cuts the lines.)
    """
    from rich.text import Text

    marks = [
        Text(chr(_FIRST_MARK + number) * (column.width or 0), overflow="crop")
        for number, column in enumerate(table.columns)
    ]
    table.add_row(*marks)
    table.add_row(*marks, style="dim")
    with console.capture() as whole:
        console.print(table, crop=False)
    with console.capture() as cropped:
        console.print(table)
    widths = _marked(whole.get().splitlines()[-1])
    *above, plain, dimmed = cropped.get().splitlines(keepends=True)
    return _Layout(
        "".join(above),
        _MARKS.sub("%s", plain),
        _MARKS.sub("%s", dimmed),
        tuple(_Field(column, widths[column], shown) for column, shown in _marked(plain).items()),
    )


def _marked(line: str) -> dict[int, int]:
    """Return, for each column whose mark is in this line, from left to right, how many of these marks there are."""
    return {ord(found[1]) - _FIRST_MARK: len(found[0]) for found in _MARKS.finditer(line)}


def _filled(texts: Iterable[str], field: _Field, *, right: bool) -> list[str]:
    """Cut or pad each text to exactly the terminal cells of its field, as Rich does."""
    from rich.cells import cell_len, set_cell_size

    def fill(text: str) -> str:
        if right:
            text = text.rstrip()
        if text.isascii() and len(text) <= field.width:
            return text.rjust(field.width) if right else text.ljust(field.width)
        room = field.width - cell_len(text)
        if room < 0:
            return set_cell_size(text, field.width - 1) + "…"
        return " " * room + text if right else text + " " * room

    filled = [fill(text) for text in texts]
    return filled if field.shown == field.width else [set_cell_size(text, field.shown) for text in filled]


def _fit(view: View, widths: list[int], available: int) -> tuple[list[int], list[int], int]:
    """Decide which columns to show and how wide. `Column` says which columns are left out or cut, and in which order.

    Numbers are cut only as a last resort, on a terminal of less than about 40 columns.

    Args:
        view: the table.
        widths: how many terminal cells each column takes if nothing is cut.
        available: the width of the terminal.

    Returns:
        The indexes of the columns to show, the width of every column, and the gap between columns (1 or 2 cells).
    """
    kept = list(range(len(widths)))
    widths = [min(width, available) for width in widths]
    columns = view.columns
    least = [
        min(width, MIN_VITAL if column.vital else MIN_FLEXIBLE) if column.flexible else width
        for width, column in zip(widths, columns, strict=True)
    ]

    def needed(widths: Sequence[int], gap: int = 1) -> int:
        return sum(widths[index] for index in kept) + gap * (len(kept) - 1)

    def drop(rank: Callable[[Column], int]) -> bool:
        last = max(kept, key=lambda index: rank(columns[index]))
        if found := rank(columns[last]) > 0:
            kept.remove(last)
        return found

    while needed(widths) > available and drop(lambda column: column.optional):
        pass
    while needed(least) > available and drop(lambda column: column.spare):
        pass
    for vital in (False, True):
        cuttable = [index for index in kept if columns[index].flexible and columns[index].vital == vital]
        _shrink(widths, cuttable, least, needed(widths) - available)
    floor = [min(width, MIN_FLEXIBLE) if column.vital else width for width, column in zip(widths, columns, strict=True)]
    _shrink(widths, kept, floor, needed(widths) - available)
    if (excess := needed(widths) - available) > 0 and kept:
        widest = max(kept, key=lambda index: widths[index])
        widths[widest] = max(MIN_FLEXIBLE, widths[widest] - excess)
    return kept, widths, 2 if needed(widths, 2) <= available else 1


def _shrink(widths: list[int], indexes: Iterable[int], least: Sequence[int], excess: int) -> None:
    """Narrow these columns by `excess` cells in all, the widest first, none below its minimum in `least`."""
    cuttable = [index for index in indexes if widths[index] > least[index]]
    while excess > 0 and cuttable:
        widest = max(cuttable, key=lambda index: widths[index])
        widths[widest] -= 1
        excess -= 1
        cuttable = [index for index in cuttable if widths[index] > least[index]]
