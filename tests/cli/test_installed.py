"""Versions of installed packages are found without importing them."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from modelcli import installed


@pytest.mark.parametrize("package", ["torch", "torchvision", "typer", "import-linter", "pip"])
def test_versions_are_those_that_importlib_finds(package: str) -> None:
    assert installed.version(package) == metadata.version(package)


def test_the_first_folder_on_the_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        (tmp_path / str(number) / f"torch-{number}.0+cpu.dist-info").mkdir(parents=True)
    (tmp_path / "0" / "torch_scatter-7.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / name) for name in ("missing", "0", "2", "1")])
    assert installed.version("torch") == "2.0+cpu"


def test_an_egg_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    egg = tmp_path / "made.egg-info"
    egg.mkdir()
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: made\nVersion: 3.1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed.version("made") == "3.1"


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert installed.version("no-such-package") is None
