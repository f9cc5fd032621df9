"""Fixtures that the tests share. They run commands in-process through the real `main()`, each in its own folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modelcli.cli import main

NETS = Path(__file__).parent / "nets.py"

#: Tests look at all files that a command leaves in a folder; Python's cache of a user's module is not one of its own.
sys.dont_write_bytecode = True


@dataclass(frozen=True)
class Result:
    """The exit code and the output of one command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err)["error"]


class Cli:
    """Runs command lines as a shell would, without starting a process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: object, code: int = 0) -> Result:
        self.capsys.readouterr()
        found = main([str(word) for word in words])
        captured = self.capsys.readouterr()
        result = Result(found, captured.out, captured.err)
        assert found == code, f"modelcli {' '.join(map(str, words))} gave {found}, not {code}:\n{captured.err}"
        assert "Traceback" not in captured.err
        return result


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that tests share, with those of other workers, so that `identify` builds each builder once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "warm-cache"


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restore the environment: completion lowers the limits on files for the rest of its process, for example."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], folder: Path) -> Cli:
    """Run command lines in a new, empty folder."""
    return Cli(capsys)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new current folder with `nets.py` in it. Settings of the machine do not affect the test.

    Modules imported from it are removed afterwards, so the next test imports its own `own.py`.
    """
    for name in ("MODELCLI_MODEL", "MODELCLI_RECIPE", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MODELCLI_NO_CACHE", raising=False)
    monkeypatch.setenv("MODELCLI_CACHE", str(tmp_path.with_name(f"{tmp_path.name}-cache")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / ".torch"))
    (tmp_path / "nets.py").write_bytes(NETS.read_bytes())
    monkeypatch.chdir(tmp_path)
    paths = list(sys.path)
    yield tmp_path
    sys.path[:] = paths
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{tmp_path}{os.sep}"):
            del sys.modules[name]
