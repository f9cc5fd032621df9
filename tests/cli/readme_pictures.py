"""Make the pictures of the README from real runs: a session in a terminal, and the page of a model: `make docs`."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
import textwrap
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from modelcli.cli import main
from tests import browser
from tests.browser import Browser

DOCS = Path(__file__).parents[2] / "docs"
SESSION, PAGE = DOCS / "session.svg", DOCS / "report.png"
#: The lines of the session. Each begins where the one before has left the folder.
LINES = (
    "modelcli summary resnet18 --depth 1",
    "modelcli replace fc 'Linear(_,10)' -m resnet18 -o head10.pth",
    "modelcli check head10.pth --trainable fc --output-shape 1,10 --finite --safe",
)
WIDTH = 92
#: The model of the page, and what the page is made of.
MODEL = (
    "modelcli freeze conv1 bn1 layer1 layer2 -m resnet50 -o tuned.pth -q",
    "modelcli report tuned.pth --stats -q",
)
#: The width of a character in an SVG of Rich.
_CELL = 12.2
_TEXT = re.compile(r'<text class="session-r\d+" x="([\d.]+)"[^>]*clip-path="url\(#session-line-(\d+)\)">(.*?)</text>')
_THEME = TerminalTheme(
    background=(22, 25, 29),
    foreground=(233, 236, 239),
    normal=[
        *((22, 25, 29), (240, 113, 120), (120, 200, 140), (232, 176, 75)),
        *((108, 184, 234), (204, 150, 220), (100, 205, 215), (233, 236, 239)),
    ],
)


class Terminal(io.StringIO):
    """A text that commands take for a terminal."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def new_folder() -> Iterator[None]:
    """Make a new folder the current one, and settings those of a usual terminal, until the block ends."""
    here, environment = Path.cwd(), dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"COLUMNS": str(WIDTH), "LINES": "50", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        os.environ["MODELCLI_CACHE"] = str(Path(folder, "cache"))
        for name in ("NO_COLOR", "FORCE_COLOR", "MODELCLI_MODEL", "MODELCLI_RECIPE"):
            os.environ.pop(name, None)
        Path(folder, "here").mkdir()
        os.chdir(Path(folder, "here"))
        try:
            yield
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(environment)


def ran(line: str) -> str:
    """Run a command as at a terminal, and return what it prints, with the codes of its colours."""
    out, err = Terminal(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(line)[1:])
    assert code == 0, f"{line}: {err.getvalue()}"
    notes = [textwrap.fill(line, WIDTH) for line in err.getvalue().splitlines()]  # as a terminal shows them
    return "\n".join([out.getvalue().rstrip("\n"), *notes])


def session() -> Console:
    """Run the lines of the session, and return a console that has recorded them and what they print."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with new_folder():
        for number, line in enumerate(LINES):
            console.print(Text("\n$ " if number else "$ ", "bold green") + Text(line, "bold"))
            console.print(Text.from_ansi(ran(line)), soft_wrap=True)
    return console


def svg_of(console: Console) -> str:
    """Return what a console has recorded as SVG. It loads no fonts, so that it looks the same without a network."""
    style = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    style = style.replace("Fira Code, monospace", "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace")
    return console.export_svg(title="modelcli", theme=_THEME, code_format=style, unique_id="session", clear=False)


def text_of(svg: str) -> list[str]:
    """Return the lines of text in an SVG that Rich has made, without blanks at their ends.

    Rich leaves out pieces of a line that are blank, so each piece is put at the column of its position.
    """
    lines: dict[str, str] = {}
    for x, line, text in _TEXT.findall(svg):
        lines[line] = lines.get(line, "").ljust(round(float(x) / _CELL)) + unescape(text).replace("\xa0", " ")
    return [line.strip() for line in lines.values()]


def screenshot() -> bytes:
    """Return a screenshot of a page as PNG."""
    with new_folder(), Browser() as opened:
        for line in MODEL:
            ran(line)
        opened.open(Path("tuned.html"), width=1280, height=780)
        opened.run("modelcliPage.select(modelcliPage.nodeAt(modelcliPage.find('layer4.0.conv2')[0])), 0")
        opened.run("document.activeElement.blur(), window.scrollTo(0, 0)")
        return opened.screenshot()


if __name__ == "__main__":
    SESSION.write_text(svg_of(session()), encoding="utf-8")
    if browser.executable() is None:
        raise SystemExit("the picture of the page needs Chromium: apt-get install chromium, or its like")
    PAGE.write_bytes(screenshot())
