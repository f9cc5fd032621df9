"""The pictures of the README are in it, are small, and show what the commands print. `make docs` makes them."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from tests.cli import readme_pictures

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_session_shows_what_its_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    svg = readme_pictures.SESSION.read_text(encoding="utf-8")
    console = readme_pictures.session()
    assert readme_pictures.text_of(svg) == readme_pictures.text_of(readme_pictures.svg_of(console)), "make docs"
    # The text of the SVG is all that the commands print, not only the same as that of the last run.
    printed = [line.strip() for line in console.export_text().splitlines() if line.strip()]
    assert [line for line in readme_pictures.text_of(svg) if line] == printed
    assert printed[0] == f"$ {readme_pictures.LINES[0]}"


def test_the_session_loads_nothing() -> None:
    svg = readme_pictures.SESSION.read_text(encoding="utf-8")
    assert re.search(r"url\((?!#)|href=|src=|@import", svg) is None


def test_the_picture_of_the_page_is_small() -> None:
    picture = readme_pictures.PAGE.read_bytes()
    assert len(picture) < 200_000
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (1280, 780)


def test_the_readme_opens_with_both() -> None:
    beginning = README.partition("\n## ")[0]
    for picture in (readme_pictures.SESSION, readme_pictures.PAGE):
        assert f"](docs/{picture.name})" in beginning
