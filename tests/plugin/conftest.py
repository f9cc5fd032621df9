"""The package of this folder, installed for a test; what modelcli remembers of packages is forgotten around it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelcli import providers
from modelcli.checkpoints import formats
from modelcli.edits import registry as edits
from tests.plugin.installing import installed


def forget() -> None:
    """Let modelcli read entry points again, and let the package be imported again."""
    edits.forget()
    providers.forget()
    formats.forget()
    importlib.invalidate_caches()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders that make the package importable, and its entry points known."""
    return installed(tmp_path_factory.mktemp("site"))


@pytest.fixture
def plugin(site: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for folder in site:
        monkeypatch.syspath_prepend(str(folder))
    forget()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelcli_plugin"]:
        del sys.modules[name]
    monkeypatch.undo()
    forget()
