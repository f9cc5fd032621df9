"""Views as tables, JSON, CSV and markdown, and the JSON document of each command (section 8 of the contract)."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from modelcli.commands.edit import EditResult
from modelcli.commands.fit_check import FitCheck
from modelcli.commands.load import LoadResult
from modelcli.edits import parse
from modelcli.edits.applied import Change
from modelcli.language.references import Source
from modelcli.model.blueprint import Blueprint, LayerTrace, ModuleInfo, Trace
from modelcli.model.state_dict_match import Mismatch
from modelcli.model.tensors import TensorInfo
from modelcli.providers.published import PublishedModel
from modelcli.recipe import Recipe
from modelcli.render import writers
from modelcli.render.documents import edit as edit_document
from modelcli.render.documents import list as list_document
from modelcli.render.documents import load as load_document
from modelcli.render.documents import modules as modules_document
from modelcli.render.documents import params as params_document
from modelcli.render.documents import recipe_log as recipe_log_document
from modelcli.render.documents import save as save_document
from modelcli.render.documents import summary as summary_document
from modelcli.render.views import (
    Branch,
    Column,
    Share,
    View,
    bar,
    compact,
    count,
    megabytes,
    path_column,
    shape,
    signed,
    text,
)
from modelcli.render.writers import safe, to_csv, to_json, to_markdown, to_plain
from modelcli.writing import Written
from tests.model.test_blueprints import TIED

HOSTILE = "a\x1b[31mred\x07\r\n\x9b2J\u202eb"
TRACED = TIED.with_trace(
    Trace(
        inputs=((1, 3),),
        layers={
            "": LayerTrace([1, 3, 11], 500),
            "embed": LayerTrace([1, 3, 4], 0),
            "norm": LayerTrace([1, 3, 4], 0),
            "head": LayerTrace({"out": [1, 3, 11], "aux": None}, 132),
        },
        macs=500,
        input_bytes=24,
        forward_backward_bytes=1000,
    )
)


def view(*rows: dict[str, Any], footer: tuple[tuple[str, str], ...] = (("Total", "1,234"),), **more: Any) -> View:
    columns = (
        Column("path", "path", style="cyan"),
        Column("type", "type", flexible=True),
        Column("params", "params", count, right=True),
        Column("trainable", "trainable", optional=1),
    )
    return View({"schema": 1, "rows": rows}, rows, columns, footer, **more)


def row(path: str = "features.0", kind: str = "Conv2d", params: int = 1234, trainable: Any = True) -> dict[str, Any]:
    return {"path": path, "type": kind, "params": params, "trainable": trainable}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(shown: View, width: int, monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """Return the characters that a terminal of this width receives."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color", "COLUMNS": str(width)} | environment).items():
        monkeypatch.setenv(name, value)
    out = Terminal()
    writers.print_rich(shown, Console(file=out, highlight=False, markup=False, emoji=False))
    return out.getvalue()


def visible(output: str) -> list[str]:
    """Return the lines without the escape sequences of modelcli's own colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines()


# --- values --------------------------------------------------------------------------------------------------------


def test_values_in_cells() -> None:
    assert [text(value) for value in (None, "", True, False, 0, "x")] == ["-", "-", "yes", "no", "0", "x"]
    assert [count(value) for value in (None, 0, 61_100_840)] == ["-", "0", "61,100,840"]
    assert [signed(value) for value in (None, 0, 5, -4_056_030)] == ["-", "0", "+5", "-4,056,030"]


def test_a_megabyte_is_a_million_bytes() -> None:
    assert megabytes(244_403_360) == "244.40 MB"
    assert megabytes(2_000_000_000) == "2,000.00 MB"
    assert megabytes(108) == "0.000108 MB"  # small models do not show 0.00 MB
    assert megabytes(0) == "0.00 MB"
    assert megabytes(None) == "-"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0"), (9_999, "9,999"), (10_000, "10.0k"), (99_950, "100k"), (999_499, "999k"),
        (999_500, "1.00M"), (61_100_840, "61.1M"), (17_563_828_224, "17.6G"), (-4_056_030, "-4.06M"),
        (9_999_999_999, "10.0G"), (6.235e11, "624G"), (10**12, "1.00T"), (10**18, "1000P"), (10**21, "1000000P"),
    ],
)  # fmt: skip
def test_large_counts_have_three_digits_and_a_unit(value: int | None, text: str) -> None:
    assert compact(None if value is None else int(value)) == text


def test_shapes() -> None:
    assert shape([1, 3, 224, 224]) == "[1,3,224,224]"
    assert shape([]) == "[]"
    assert shape(None) == "-"
    assert shape({"out": [1, 21], "aux": None}) == "{out:[1,21],aux:-}"
    assert shape([[1, 2], [1, 3]]) == "([1,2],[1,3])"


# --- text from a file never reaches the terminal as control codes ---------------------------------------------------


def test_control_characters_are_made_visible() -> None:
    assert safe("features.0") == "features.0"
    assert safe("模型 é ½") == "模型 é ½"
    assert safe("\x1b[31m") == "\\x1b[31m"
    assert safe("a\tb\nc\rd\0\x7f\x9b") == "a\\tb\\nc\\rd\\x00\\x7f\\x9b"
    assert safe("\u202e\u200b\u2028\ufeff\U000e0001") == "\\u202e\\u200b\\u2028\\ufeff\\U000e0001"
    assert safe("\ud800\udcff\ue000") == "\\ud800\\udcff\\ue000"


def test_no_unicode_control_character_is_left() -> None:
    left = safe("".join(map(chr, range(sys.maxunicode + 1))))
    assert {unicodedata.category(character) for character in left}.isdisjoint({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


@given(st.text(st.characters(), max_size=20))
@settings(deadline=None)
def test_no_text_keeps_a_control_character(words: str) -> None:
    assert safe(words).isprintable()
    assert "\x1b" not in safe(words)
    assert safe(safe(words)) == safe(words)


@pytest.mark.parametrize("write", [to_plain, to_csv, to_markdown, lambda shown: to_json(shown.document)])
def test_no_writer_lets_a_control_character_through(write: Any) -> None:
    shown = view(row(HOSTILE, HOSTILE), footer=(("Reason", HOSTILE),))
    for character in "\x1b\x07\r\x9b\u202e":
        assert character not in write(shown)
    assert to_plain(shown).count("\n") == 4  # header, row, empty line, footer: the newline in the name is escaped


def test_no_control_character_reaches_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_terminal(view(row(HOSTILE, HOSTILE), footer=(("Reason", HOSTILE),)), 200, monkeypatch)
    lines = visible(shown)
    assert "\x1b" not in "".join(lines)
    assert all(line.isprintable() for line in lines)
    assert "a\\x1b[31mred\\x07\\r\\n\\x9b2J\\u202eb" in lines[2]
    assert lines[-1].endswith("a\\x1b[31mred\\x07\\r\\n\\x9b2J\\u202eb")
    body = View({}, [], (), body=f"Net(\n  {HOSTILE}\n)")
    assert "\x1b" not in on_terminal(body, 80, monkeypatch)
    assert "\x1b" not in to_plain(body)


def test_rich_markup_and_emoji_in_names_are_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = view(
        row("[bold]x[/bold]", "[link=http://a]b[/link]"), row("[/]", ":smile:"), footer=(("[red]k", "[red]v"),)
    )
    lines = visible(on_terminal(shown, 100, monkeypatch))
    assert lines[2].split()[:2] == ["[bold]x[/bold]", "[link=http://a]b[/link]"]
    assert lines[3].split()[:2] == ["[/]", ":smile:"]
    assert lines[-1] == "[red]k: [red]v"
    assert visible(on_terminal(View({}, [], (), body="[bold]x"), 100, monkeypatch)) == ["[bold]x"]


# --- on a terminal: colour, and the width --------------------------------------------------------------------------

LONG = [
    row("encoder.layers.11.self_attention", "NonDynamicallyQuantizableLinear", 61_100_840),
    row("features.0", "Conv2d", 5),
]


@pytest.mark.parametrize("width", [200, 90, 89, 88, 80, 79, 70, 60, 50, 40, 30])
@pytest.mark.parametrize("header", [True, False])
def test_a_table_fits_the_width_of_the_terminal(width: int, header: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = visible(on_terminal(view(*LONG, header=header), width, monkeypatch))
    table = lines[:-1]
    assert len(table) == (5 if header else 2)  # title, rule, two rows and the space below: nothing is wrapped
    assert max(cell_len(line.rstrip()) for line in table) <= width


def test_the_order_in_which_columns_shrink_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """First the gaps shrink, then optional columns go, then flexible ones are cut; paths and numbers stay longest."""
    whole = len("encoder.layers.11.self_attention") + len("NonDynamicallyQuantizableLinear") + len("61,100,840")
    everything = whole + len("trainable")

    def shown_at(width: int) -> str:
        return "\n".join(visible(on_terminal(view(*LONG), width, monkeypatch)))

    for width in (everything + 6, everything + 3):
        assert "trainable" in shown_at(width)
        assert "…" not in shown_at(width)
    assert "self_attention  NonDyn" in shown_at(everything + 6)
    for width in (everything + 2, whole + 2):
        assert "trainable" not in shown_at(width)
        assert "…" not in shown_at(width)
    narrow = shown_at(whole - 10)
    assert "encoder.layers.11.self_attention" in narrow
    assert "61,100,840" in narrow
    assert "NonDynamicallyQuan…" in narrow


def test_wide_characters_take_two_terminal_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = view(row("模型.模型", "模型模型模型"), row("a", "b"))
    assert "模型.模型" in visible(on_terminal(shown, 80, monkeypatch))[2]
    assert "模型模型模型" in visible(on_terminal(shown, 80, monkeypatch))[2]
    assert max(map(cell_len, visible(on_terminal(shown, 30, monkeypatch))[:-1])) <= 30


def test_colour_on_a_terminal_and_none_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[36mfeatures.0" in on_terminal(view(row()), 80, monkeypatch)  # cyan
    assert not re.search(r"\x1b\[[0-9;]*3\d", on_terminal(view(row()), 80, monkeypatch, NO_COLOR="1"))


def test_a_tree_or_printed_model_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "Net(\n  " + "x" * 300 + "\n)"
    assert visible(on_terminal(View({}, [], (), body=body), 40, monkeypatch)) == body.split("\n")


PATHS = [row(f"encoder.layers.encoder_layer_{number}.mlp.0", "Linear", 10**8) for number in range(12)]


def narrow_view(*rows: dict[str, Any]) -> View:
    columns = (
        path_column("path", "path"),
        Column("type", "type", flexible=True, spare=1),
        Column("params", "params", count, right=True),
        Column("macs", "mult-adds", count, right=True),
    )
    return View({}, [one | {"macs": 10**10} for one in rows], columns)


@pytest.mark.parametrize("width", range(60, 251, 10))
def test_paths_stay_distinct_and_numbers_whole_from_60_to_250(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.split() for line in visible(on_terminal(narrow_view(*PATHS), width, monkeypatch))[2:14]]
    assert len({line[0] for line in lines}) == len(PATHS)
    assert all(line[-2:] == ["100,000,000", "10,000,000,000"] for line in lines)
    whole = [line[0] == one["path"] for line, one in zip(lines, PATHS, strict=True)]
    assert all(whole) or width < 80


def test_a_path_is_cut_in_the_middle_first_and_keeps_its_numbers() -> None:
    path = "encoder.layers.encoder_layer_11.mlp.0.weight"
    cut = {width: writers._cut_path(path, width, "…") for width in range(10, 50)}
    assert cut[44] == path
    assert cut[43] == "encoder.l….encoder_layer_11.mlp.0.weight"
    assert cut[30] == "encoder.l….e…11.mlp.0.weight"
    assert cut[23] == "e….l….e…11.m….0.weight"
    assert all(cell_len(text) <= width for width, text in cut.items())
    assert writers._cut_path("layers.block_[0-11].x", 18, "…") == "layers.b…[0-11].x"


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.integers(1, 40))
@settings(deadline=None)
def test_cut_text_fits_the_width(words: str, width: int) -> None:
    for cut in (writers._cut_end, writers._cut_middle, writers._cut_path):
        assert cell_len(cut(words, width, "…")) <= width
        assert cut(words, 400, "…") == words


def test_paths_of_thousands_of_components_are_cut_at_once() -> None:
    started = time.process_time()
    for _ in range(100):
        assert cell_len(writers._cut_path("aaa." * 2000 + "b", 40, "…")) <= 40
    assert time.process_time() - started < 3


def test_a_narrow_terminal_leaves_out_the_least_important_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {width: visible(on_terminal(narrow_view(*PATHS), width, monkeypatch))[0] for width in (60, 50)}
    assert shown[60].split() == ["path", "type", "params", "mult-adds"]
    assert shown[50].split() == ["path", "params", "mult-adds"]


TREE = View(
    {},
    [],
    (),
    tree=[
        Branch("", ".  Net", "()", "  1,234"),
        Branch("├── ", "größe  Conv2d", f"({'x, ' * 30}end)", "  1,234"),
        Branch("│   └── ", "name_of_a_module  NonDynamicallyQuantizableLinear", "(1, 2)", "  1,234"),
    ],
)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_tree_is_not_wrapped_and_keeps_its_numbers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = visible(on_terminal(TREE, width, monkeypatch))
    assert len(lines) == 3
    assert all(line.endswith("  1,234") and len(line) <= width for line in lines)
    assert lines[1].startswith("├── größe  Conv2d(x, x,")
    assert lines[1].endswith("end)  1,234" if width >= 120 else "…)  1,234")
    assert to_plain(TREE).splitlines()[1] == f"├── größe  Conv2d({'x, ' * 30}end)  1,234"


def test_a_tree_on_a_terminal_that_shows_only_ascii() -> None:
    class Ascii(Terminal):
        encoding = "ascii"

    out = Ascii()
    writers.print_rich(TREE, Console(file=out, width=60))
    assert out.getvalue().isascii()
    assert "|-- gr\\xf6\\xdfe  Conv2d(x, x" in out.getvalue()
    assert "|   `-- name_of_a_module" in out.getvalue()
    assert to_plain(TREE, encoding="ascii").splitlines()[2].startswith("|   `-- ")


def test_the_bar_of_a_share() -> None:
    assert [bar(Share(part, 80)) for part in (0, 1, 8, 40, 79, 80)] == ["", "▏", "█", "█████", "█████████▉", "█" * 10]
    assert bar(Share(1, 10**9)) == "▏"
    assert bar(Share(0, 0)) == bar(None) == ""


# --- a long table: written without Rich's table, with the same bytes as Rich's ---------------------------------------

MIXED = [
    row("encoder.layers.11.self_attention", "NonDynamicallyQuantizableLinear", 61_100_840),
    row("", "", 0, None),
    row("  spaces  ", " ", -1, ""),
    row("模型.層.重み", "模型模型模型模型模型模型模型模型模型", 5, False),
    row(HOSTILE, HOSTILE * 2, 10**30),
    row("e\u0301te\u0301" * 9, "a\u0301\u0302\u0303" * 40, 7),
    row("\u0301", "\ufe0f#\ufe0f❤\ufe0f🇨🇭👍🏽", 8, False),
    row("100%s %d", "[bold]%(x)s[/bold] :smile:", 9),
]


def odd_one_out(shown: dict[str, Any]) -> bool:
    return shown["params"] % 2 == 1


def long_view(*rows: dict[str, Any], **more: Any) -> View:
    """Return a view with every kind of column: styled or not, left and right, optional, flexible, with empty cells."""
    columns = (
        Column("path", "path", style="cyan"),
        Column("type", "type", flexible=True),
        Column("type", "trailing ", str, right=True, style="bold #ff8800", flexible=True, optional=2),
        Column("params", "params", count, right=True),
        Column("empty", "", lambda _: ""),
        Column("trainable", "trainable", style="italic", optional=1),
    )
    return View({}, rows, columns, (("Total", "1,234"),), **more)


def printed(shown: View, width: int, *, screenful: int, **more: Any) -> str:
    """Return what is written to a terminal of this width and of `screenful` rows."""
    out = Terminal()
    options = {"color_system": "256", "highlight": False, "markup": False, "emoji": False} | more
    writers.print_rich(shown, Console(file=out, force_terminal=True, width=width, height=screenful, **options))
    return out.getvalue()


def both_ways(shown: View, width: int, **more: Any) -> tuple[str, str]:
    """Return what is printed if the table is longer than the screen, and what Rich prints for the same table."""
    return printed(shown, width, screenful=0, **more), printed(shown, width, screenful=len(shown.rows), **more)


def rows_laid_out_by_rich(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that grows by an item for each row that is added to a Rich table."""
    laid_out: list[object] = []
    add_row = Table.add_row

    def counted(self: Table, *cells: Any, **more: Any) -> None:
        laid_out.append(cells)
        add_row(self, *cells, **more)

    monkeypatch.setattr(Table, "add_row", counted)
    return laid_out


@pytest.mark.parametrize("dimmed", [None, odd_one_out], ids=["plain", "dimmed"])
@pytest.mark.parametrize("header", [True, False], ids=["header", "no header"])
@pytest.mark.parametrize("colours", [None, "standard", "256", "truecolor"])
@pytest.mark.parametrize("width", [200, 120, 80, 60, 30])
def test_a_long_table_is_what_rich_prints(width: int, colours: str | None, header: bool, dimmed: Any) -> None:
    ours, richs = both_ways(long_view(*MIXED, header=header, dimmed=dimmed), width, color_system=colours)
    assert ours == richs
    assert ("\x1b[" in ours) == (colours is not None)
    assert ("\x1b[2;" in ours) == (colours is not None and dimmed is not None)


def test_a_long_table_fits_a_narrow_terminal() -> None:
    lines = {width: visible(both_ways(long_view(*MIXED), width)[0]) for width in (600, 80)}
    assert "trainable" in lines[600][0]
    assert not any("…" in line for line in lines[600])
    assert "trainable" not in lines[80][0]
    assert any("…" in line for line in lines[80])


@pytest.mark.parametrize("width", range(1, 40))
@pytest.mark.parametrize("header", [True, False])
def test_a_long_table_on_a_terminal_with_no_room_for_its_columns(width: int, header: bool) -> None:
    ours, richs = both_ways(long_view(*MIXED, header=header, dimmed=odd_one_out), width)
    assert ours == richs


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"COLORTERM": "truecolor"}, {}])
def test_a_long_table_respects_no_color_and_term(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = long_view(*MIXED, dimmed=odd_one_out)
    ours, richs = (on_terminal(shown, 90, monkeypatch, **environment, LINES=lines) for lines in ("5", "50"))
    assert ours == richs
    assert ("\x1b[36m" in ours) == (not environment or "COLORTERM" in environment)


def test_a_long_table_on_a_terminal_without_line_drawing() -> None:
    class Ascii(Terminal):
        encoding = "ascii"

    shown, written = view(*LONG), []
    for screenful in (0, 2):
        out = Ascii()
        writers.print_rich(shown, Console(file=out, width=90, height=screenful, color_system="256"))
        written.append(out.getvalue())
    assert written[0] == written[1]
    assert written[0].isascii()
    assert "|" in written[0]


CELLS = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.characters(codec="ascii"),
        st.sampled_from(" -模가あ👍🏽🇨❤#\u0301\u0308\u200d\ufe0f\ufe0e\u0e33\u1160\u3000"),
    ),
    max_size=30,
)


@given(
    rows=st.lists(st.builds(row, CELLS, CELLS, st.integers(), st.booleans()), min_size=1, max_size=6),
    width=st.integers(1, 120),
    header=st.booleans(),
    dimmed=st.sampled_from([None, odd_one_out]),
)
@settings(deadline=None)
def test_any_cells_in_a_long_table_are_what_rich_prints(
    rows: list[dict[str, Any]], width: int, header: bool, dimmed: Any
) -> None:
    ours, richs = both_ways(long_view(*rows, header=header, dimmed=dimmed), width)
    assert ours == richs


def test_rich_lays_out_at_most_one_screenful_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out = rows_laid_out_by_rich(monkeypatch)
    for rows, expected in ((30, 30), (31, 2), (100_000, 2)):  # two rows show how all the others look
        laid_out.clear()
        shown = view(*[row(f"layer.{number}") for number in range(rows)])
        lines = visible(printed(shown, 80, screenful=30))
        assert len(laid_out) == expected
        assert len(lines) == rows + 4  # title, rule, the space below, the footer
        assert lines[1 + rows].startswith(f"layer.{rows - 1} ")


def test_rich_prints_long_tables_on_an_old_windows_console(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out = rows_laid_out_by_rich(monkeypatch)
    printed(view(*[row()] * 31), 80, screenful=30, legacy_windows=True)
    assert len(laid_out) == 31


@pytest.mark.parametrize("reason", [BrokenPipeError, KeyboardInterrupt])
def test_a_long_table_stops_when_interrupted_or_the_terminal_closes(reason: type[BaseException]) -> None:
    """The table is written in batches: rows after an interruption are not even formatted."""

    class Closing(Terminal):
        def flush(self) -> None:
            if self.getvalue().count("\n") > 2500:
                raise reason

    made = []
    shown = view(*[row(f"layer.{number}") for number in range(10_000)], dimmed=lambda shown: made.append(shown))
    out = Closing()
    with pytest.raises(reason):
        writers.print_rich(shown, Console(file=out, width=80, height=24))
    assert 2400 < len(made) <= 2500 + writers.BATCH
    assert out.getvalue().endswith("\n")


# --- not on a terminal ---------------------------------------------------------------------------------------------


def test_nothing_is_cut_or_wrapped_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    name = "encoder." * 60 + "weight"
    lines = to_plain(view(row(name, "K" * 300), row())).split("\n")
    assert lines[1].split() == [name, "K" * 300, "1,234", "yes"]
    assert "\x1b" not in "".join(lines)
    assert "…" not in "".join(lines)


def test_columns_are_aligned_in_a_pipe() -> None:
    assert to_plain(view(row(), row("classifier.10", "Linear", 5, None))) == (
        "path           type    params  trainable\n"
        "features.0     Conv2d   1,234  yes\n"
        "classifier.10  Linear       5  -\n"
        "\n"
        "Total: 1,234\n"
    )


def test_a_table_without_rows_or_header() -> None:
    assert to_plain(view()) == "path  type  params  trainable\n\nTotal: 1,234\n"
    assert to_plain(view(header=False)) == "Total: 1,234\n"
    assert to_plain(view(row(), header=False)) == "features.0  Conv2d  1,234  yes\nTotal: 1,234\n"


# --- CSV, markdown, JSON -------------------------------------------------------------------------------------------


def test_csv_is_the_rows_with_plain_numbers() -> None:
    shown = view(row("a,b", 'say "x"', 61_100_840), row("c", "", 0, False), row("d", "e", 1, None))
    assert to_csv(shown) == ('path,type,params,trainable\n"a,b","say ""x""",61100840,true\nc,,0,false\nd,e,1,\n')
    assert list(csv.reader(io.StringIO(to_csv(shown))))[1] == ["a,b", 'say "x"', "61100840", "true"]


def test_csv_keeps_shapes_as_json() -> None:
    shown = View({}, [{"shape": [1, 3]}, {"shape": None}, {"shape": {"out": [2]}}], [Column("shape", "shape", shape)])
    assert list(csv.reader(io.StringIO(to_csv(shown)))) == [["shape"], ["[1,3]"], [""], ['{"out":[2]}']]


def test_markdown_is_a_table() -> None:
    assert to_markdown(view(row(), row("a|b\nc", "x\\y", 5, False))) == (
        "| path | type | params | trainable |\n"
        "| --- | --- | ---: | --- |\n"
        "| features.0 | Conv2d | 1,234 | yes |\n"
        "| a\\|b\\\\nc | x\\\\y | 5 | no |\n"
    )


def test_csv_and_markdown_are_the_rows_and_nothing_else() -> None:
    for written in (to_csv(view(row(), body="a tree")), to_markdown(view(row(), body="a tree"))):
        assert "Total" not in written
        assert "a tree" not in written
        assert "features.0" in written


def test_json_is_one_document_on_one_line() -> None:
    document = {"schema": 1, "name": HOSTILE + "模", "values": [float("nan"), float("inf"), -float("inf"), 1.5, None]}
    written = to_json(document)
    assert "\n" not in written
    assert written.isascii()
    assert json.loads(written) == document | {"values": ["NaN", "Infinity", "-Infinity", 1.5, None]}


# --- the documents of the contract ---------------------------------------------------------------------------------

TOTALS = {"params": 62, "trainable_params": 52, "non_trainable_params": 10, "buffers": 5}
TOTALS_BYTES = TOTALS | {"param_bytes": 228, "buffer_bytes": 24}


def test_summary() -> None:
    shown = summary_document.summary("nets.py:Model", TRACED)
    document = shown.document
    assert document["schema"] == 1
    assert document["model"] == {"reference": "nets.py:Model", "class": "Model"}
    assert document["input"] == [[1, 3]]
    assert document["layers"][0] == {
        "path": ".",
        "type": "Model",
        "depth": 0,
        "output_shape": [1, 3, 11],
        "params": 62,
        "trainable": "partial",
        "macs": 500,
        "executed": True,
        "shared_with": None,
    }
    rows = {layer["path"]: layer for layer in document["layers"]}
    assert [rows[path]["depth"] for path in (".", "body", "body.0")] == [0, 1, 2]
    assert rows["head"]["output_shape"] == {"out": [1, 3, 11], "aux": None}
    assert (rows["body"]["executed"], rows["body"]["output_shape"], rows["body"]["macs"]) == (False, None, None)
    assert rows["body.1"]["trainable"] is None
    assert document["totals"] == TOTALS_BYTES | {
        "macs": 500,
        "input_bytes": 24,
        "forward_backward_bytes": 1000,
        "total_bytes": 24 + 1000 + 228 + 24,
    }
    plain = to_plain(shown)
    for line in (
        r"path +type +output shape +params +trainable +mult-adds",
        r"\. +Model +\[1,3,11\] +62 +partial +500",
        r"body +Sequential +\(not called\) +10 +partial +-",
        r"head +Linear +\{out:\[1,3,11\],aux:-\} +44 +yes +132",
        r"body\.1 +ReLU +\(not called\) +0 +- +-",
        r"Input: +\[1,3\]",
        r"Total params: +62",
        r"Trainable params: +52",
        r"Non-trainable params: +10",
        r"Buffers: +5",
        r"Total mult-adds: +500",
        r"Input size: +0\.000024 MB",
        r"Forward/backward pass size: +0\.001000 MB",
        r"Params size: +0\.000228 MB",
        r"Estimated total size: +0\.001276 MB",
    ):
        assert re.search(rf"^{line}$", plain, re.MULTILINE), line


def test_summary_to_a_depth_keeps_the_totals() -> None:
    document = summary_document.summary("m", TRACED, depth=1).document
    assert [layer["path"] for layer in document["layers"]] == [".", "embed", "norm", "body", "head"]
    assert document["totals"]["params"] == 62


def test_summary_without_a_pass_says_why() -> None:
    shown = summary_document.summary("m", TIED.with_trace(Trace(None, reason="no input size is known")))
    assert shown.document["input"] is None
    assert shown.document["totals"]["total_bytes"] is None
    assert shown.document["totals"]["params"] == 62
    assert re.search(r"^Not complete: +no input size is known$", to_plain(shown), re.MULTILINE)
    assert "not called" not in to_plain(shown)


def test_params() -> None:
    shown = params_document.params("m", TIED, TIED.tensors)
    assert shown.document["model"] == {"reference": "m", "class": "Model"}
    assert shown.document["tensors"][0] == {
        "name": "embed.weight",
        "shape": [11, 4],
        "dtype": "float32",
        "elements": 44,
        "bytes": 176,
        "kind": "parameter",
        "trainable": True,
        "tied_to": None,
    }
    rows = {tensor["name"]: tensor for tensor in shown.document["tensors"]}
    assert rows["head.weight"]["tied_to"] == "embed.weight"
    assert (rows["norm.running_mean"]["kind"], rows["norm.running_mean"]["trainable"]) == ("buffer", None)
    assert rows["norm.weight"]["trainable"] is False
    assert (rows["norm.num_batches_tracked"]["shape"], rows["norm.num_batches_tracked"]["elements"]) == ([], 1)
    assert shown.document["totals"] == TOTALS_BYTES
    plain = to_plain(shown)
    assert re.search(r"^head.weight +\[11,4\] +float32 +44 +176 +parameter +yes +embed.weight$", plain, re.MULTILINE)
    assert re.search(r"^Params: +62 \(52 trainable\)$", plain, re.MULTILINE)


def test_params_of_a_selection_add_up_to_it() -> None:
    shown = params_document.params("m", TIED, TIED.tensors[5:7])
    assert shown.document["totals"]["params"] == 10
    assert [tensor["name"] for tensor in shown.document["tensors"]] == ["body.0.weight", "body.0.bias"]


def test_params_with_values() -> None:
    values = {"body.0.bias": [0.5, float("nan")]}
    shown = params_document.params(
        "m", TIED, TIED.tensors[6:7], values=values, value_texts={"body.0.bias": "[0.5,nan]"}
    )
    assert json.loads(to_json(shown.document))["tensors"][0]["values"] == [0.5, "NaN"]
    assert to_plain(shown).split("\n")[1].endswith("[0.5,nan]")


def test_a_lazy_parameter_has_no_shape() -> None:
    lazy = Blueprint((ModuleInfo("", "M", ("M",)),), (TensorInfo("w", None, "float32", requires_grad=True),))
    shown = params_document.params("m", lazy, lazy.tensors)
    assert shown.document["tensors"][0]["shape"] is None
    assert re.search(r"^w +- +float32 +0 +0 ", to_plain(shown), re.MULTILINE)


ALL = [module.path for module in TIED.modules]


def test_modules() -> None:
    shown = modules_document.modules("m", TIED, ALL, depth=None)
    assert [set(entry) >= {"path", "type", "config", "params", "trainable"} for entry in shown.document["modules"]] == [
        True
    ] * 7
    assert shown.document["modules"][4] == {
        "path": "body.0",
        "type": "Linear",
        "config": "in_features=4, out_features=2, bias=True",
        "params": 10,
        "trainable": "partial",
        "shared_with": None,
    }
    assert shown.document["modules"][0]["path"] == "."
    assert shown.document["totals"] == TOTALS_BYTES
    assert len(modules_document.modules("m", TIED, ALL, depth=1).document["modules"]) == 5


def test_modules_as_a_tree() -> None:
    shown = modules_document.modules("m", TIED, ALL, depth=None, style="tree")
    assert to_plain(shown) == (
        ".  Model()  62\n"
        "├── embed  Embedding(11, 4)  44\n"
        "├── norm  BatchNorm1d(4)  8\n"
        "├── body  Sequential()  10\n"
        "│   ├── 0  Linear(in_features=4, out_features=2, bias=True)  10\n"
        "│   └── 1  ReLU()\n"
        "└── head  Linear(in_features=4, out_features=11, bias=False)  44\n"
    )
    assert len(shown.document["modules"]) == 7
    shallow = modules_document.modules("m", TIED, ALL, depth=1, style="tree")
    assert to_plain(shallow).count("\n") == 5
    below = modules_document.modules("m", TIED, ["body", "body.0"], depth=None, style="tree")
    assert to_plain(below).split("\n")[0] == "body  Sequential()  10"
    assert to_plain(below).count("\n") == 3  # a match inside another match is shown only once


def test_modules_as_the_text_of_print_model() -> None:
    shown = modules_document.modules("m", TIED, ["body", "body.1", "head"], depth=None, style="repr")
    assert to_plain(shown) == (
        "Sequential(\n  (0): Linear(in_features=4, out_features=2, bias=True)\n  (1): ReLU()\n)\n"
        "Linear(in_features=4, out_features=11, bias=False)\n"
    )


def test_a_shared_module_names_the_first_path_of_it() -> None:
    shared = Blueprint(
        (
            ModuleInfo("", "M", ("M",)),
            ModuleInfo("a", "ReLU", ("ReLU",)),
            ModuleInfo("b", "ReLU", ("ReLU",), shared_with="a"),
        ),
        (),
    )
    assert "└── b  ReLU()  (same as a)" in to_plain(
        modules_document.modules("m", shared, [""], depth=None, style="tree")
    )


def an_edit(**more: Any) -> View:
    changes = (Change("head", "replace", "Linear(4, 11)", "Linear(4, 3)", 44, 15),)
    check = FitCheck(True, None, [1, 3], ((1, 3),))
    written = Written(Path("out.pth"), "pth", 8, 244_403_360)
    result = EditResult("m", TIED, TIED.totals, ("replace head Linear(4,3)",), changes, check, written)
    return edit_document.edits(replace(result, **more), [("wrote", "out.pth")])


def test_edits() -> None:
    document = an_edit().document
    assert document["edits"] == ["replace head Linear(4,3)"]
    assert document["changes"] == [
        {
            "path": "head",
            "action": "replace",
            "before": "Linear(4, 11)",
            "after": "Linear(4, 3)",
            "params_before": 44,
            "params_after": 15,
        }
    ]
    assert document["totals_before"] == document["totals_after"] == TOTALS_BYTES
    assert {key: document["check"][key] for key in ("ran", "reason", "output_shape")} == {
        "ran": True,
        "reason": None,
        "output_shape": [1, 3],
    }
    assert document["output"] == "out.pth"
    assert an_edit(written=None).document["output"] is None


def test_what_an_edit_prints() -> None:
    plain = to_plain(an_edit())
    assert plain.split("\n")[0] == "head  Linear(4, 11)  ->  Linear(4, 3)  -29 params"
    assert re.search(r"^params: +62$", plain, re.MULTILINE)
    assert re.search(r"^check: +runs: \[1,3\] -> \[1,3\]$", plain, re.MULTILINE)
    assert re.search(r"^wrote: +out\.pth$", plain, re.MULTILINE)
    skipped = to_plain(an_edit(check=FitCheck(False, "no input is known")))
    assert re.search(r"^check: +not made: no input is known$", skipped, re.MULTILINE)
    smaller = Blueprint(TIED.modules, TIED.tensors[:1])
    assert re.search(r"^params: +62 -> 44 \(-18\)$", to_plain(an_edit(blueprint=smaller)), re.MULTILINE)


def test_an_edit_of_the_root_is_shown_as_a_dot() -> None:
    change = Change("", "replace", "Linear(4, 11)", "Linear(4, 3)", 44, 15)
    assert an_edit(changes=(change,)).document["changes"][0]["path"] == "."


def test_load() -> None:
    mismatched = (Mismatch("d", (3, 4), (3, 5)),)
    shown = load_document.load(LoadResult("m", TIED, 5, ("a",), ("b", "c"), mismatched, Path("modelcli.toml")))
    assert {key: shown.document[key] for key in ("matched", "missing", "unexpected", "mismatched")} == {
        "matched": 5,
        "missing": ["a"],
        "unexpected": ["b", "c"],
        "mismatched": [{"name": "d", "expected": [3, 4], "found": [3, 5]}],
    }
    plain = to_plain(shown)
    for line in (
        r"d +mismatched +\[3,4\] +\[3,5\]",
        r"a +missing +- +-",
        r"c +unexpected +- +-",
        r"matched: +5",
        r"missing: +1",
        r"unexpected: +2",
    ):
        assert re.search(rf"^{line}$", plain, re.MULTILINE), line


def test_save() -> None:
    written = Written(Path("out.pth"), "pth", 8, 244_403_360)
    shown = save_document.save(EditResult("m", TIED, TIED.totals, (), (), FitCheck(False), written), "pth")
    document = dict(shown.document)
    assert {key: document[key] for key in ("output", "format", "tensors", "params", "bytes")} == {
        "output": "out.pth",
        "format": "pth",
        "tensors": 8,
        "params": 62,
        "bytes": 244_403_360,
    }
    assert to_plain(shown) == "out.pth  pth  8 tensors  62 params  244.40 MB\n"


def test_list() -> None:
    entry = PublishedModel("alexnet", "c", ("IMAGENET1K_V1",), 61_100_840, 714_188_480)
    shown = list_document.models([entry, replace(entry, name="odd", macs=None, weights=())])
    row = {
        "name": "alexnet",
        "params": 61_100_840,
        "macs": 714_188_480,
        "input_size": None,
        "weights": ["IMAGENET1K_V1"],
        "group": "c",
    }
    assert shown.document == {"schema": 1, "models": [row, row | {"name": "odd", "macs": None, "weights": []}]}
    assert re.search(r"^alexnet +61,100,840 +714,188,480 +c +IMAGENET1K_V1$", to_plain(shown), re.MULTILINE)
    assert re.search(r"^Builders: +2$", to_plain(shown), re.MULTILINE)


def test_log() -> None:
    edits = (parse("freeze features"), parse("freeze a"))
    shown = recipe_log_document.log(Recipe(Path("modelcli.toml"), Source("alexnet", weights="DEFAULT"), edits))
    assert shown.document["recipe"] == "modelcli.toml"
    assert shown.document["model"] == {"reference": "alexnet", "class": None}
    assert shown.document["edits"] == ["freeze features", "freeze a"]
    plain = to_plain(shown)
    assert re.search(r"^1 +freeze features$", plain, re.MULTILINE)
    assert re.search(r"^2 +freeze a$", plain, re.MULTILINE)
    assert re.search(r"^weights: +DEFAULT$", plain, re.MULTILINE)
    assert "key" not in plain
