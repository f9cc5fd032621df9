"""The pages in `docs/` that say how to add something show the text of the examples, line by line."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/adding-*.md"))
SOURCES = (ROOT / "tests" / "plugin" / "src", ROOT / "src")


def excerpts(page: str, language: str) -> Iterator[str]:
    """The pieces of a page's blocks of code: a line of three dots stands for what is left out."""
    for block in re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for piece in re.split(r"^\s*\.\.\.\n", block, flags=re.MULTILINE):
            if piece.strip():
                yield textwrap.dedent(piece).strip("\n")


@cache
def indented(text: str) -> dict[str, list[str]]:
    """The lines of a text without their indentation, and with it."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        found.setdefault(line.strip(), []).append(line[: len(line) - len(line.lstrip())])
    return found


def stands_in(excerpt: str, text: str) -> bool:
    """Whether the lines stand in a text one after another, all of them indented by as much more.

    Blank lines do not count: the formatter puts two between functions, and one between methods.
    """
    excerpt, text = (re.sub(r"\n\s*\n", "\n", found) for found in (excerpt, text))
    first = excerpt.splitlines()[0]
    return any(
        f"\n{textwrap.indent(excerpt, indent)}\n" in f"\n{text}\n" for indent in set(indented(text).get(first, []))
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_on_the_pages_is_that_of_the_examples(page: Path) -> None:
    found = list(excerpts(page.read_text(encoding="utf-8"), "python"))
    texts = [path.read_text(encoding="utf-8") for folder in SOURCES for path in sorted(folder.rglob("*.py"))]
    assert len(found) > 1
    assert [excerpt for excerpt in found if not any(stands_in(excerpt, text) for text in texts)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_registration_on_the_pages_is_that_of_the_example(page: Path) -> None:
    (shown,) = excerpts(page.read_text(encoding="utf-8"), "toml")
    assert stands_in(shown, (ROOT / "tests" / "plugin" / "pyproject.toml").read_text(encoding="utf-8"))


def test_changed_code_is_found() -> None:
    text = "def a():\n    b = 1\n    return b\n"
    assert stands_in("b = 1\nreturn b", text)
    assert not stands_in("b = 1\n  return b", text)
    assert not stands_in("b = 2", text)
