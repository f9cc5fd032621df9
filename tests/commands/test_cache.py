"""The blueprint cache: showing a builder again does not import torch, and damaged entries are ignored."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from modelcli.commands import blueprint_cache
from modelcli.commands.blueprint_cache import Key
from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.tensors import TensorInfo
from tests.conftest import Cli

KEY = Key("alexnet", None, None, (), "eval")
BLUEPRINT = Blueprint((ModuleInfo("", "Net"),), (TensorInfo("w", (2, 3), "float32", requires_grad=True),))


def entry() -> Path:
    (path,) = blueprint_cache.entries()
    return path


def test_the_second_look_needs_no_torch(cli: Cli) -> None:
    first = cli("summary", "squeezenet1_1").out
    code = "import sys; from modelcli.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for words in (["summary", "squeezenet1_1"], ["params", "squeezenet1_1"], ["modules", "squeezenet1_1", "--repr"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert words[0] != "summary" or done.stdout == first


@pytest.mark.parametrize(
    "words",
    [
        ("summary", "squeezenet1_1(num_classes=7)"),
        ("summary", "squeezenet1_1", "--weights", "DEFAULT"),
        ("summary", "squeezenet1_1", "--input-size", "1,3,64,64"),
        ("summary", "squeezenet1_1", "--mode", "train"),
    ],
)
def test_each_setting_that_changes_a_blueprint_has_its_own_entry(cli: Cli, words: tuple[str, ...]) -> None:
    """Arguments, weights, input and mode each have their own entry, and the result equals that without a cache."""
    cli("summary", "squeezenet1_1")
    before = len(blueprint_cache.entries())
    for _ in range(2):
        assert cli(*words, "--json").json == cli(*words, "--no-cache", "--json").json
    assert len(blueprint_cache.entries()) == before + 1


def test_versions_are_part_of_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blueprint_cache.put(KEY, BLUEPRINT)
    assert blueprint_cache.get(KEY) == BLUEPRINT
    monkeypatch.setattr("modelcli.installed.version", lambda _package: "99.0")
    assert blueprint_cache.get(KEY) is None


@pytest.mark.parametrize("reference", ["nets.py:Net", "nets:Net", "Sequential(nets:MyLinear(2,3))"])
def test_classes_from_files_are_never_cached(cli: Cli, reference: str) -> None:
    cli("modules", reference)
    assert blueprint_cache.entries() == []


def test_recipes_with_edits_and_checkpoints_are_not_cached(cli: Cli) -> None:
    cli("load", "squeezenet1_1")
    kept = blueprint_cache.entries()
    cli("freeze", "features")
    cli("save", "out.pth")
    cli("summary")
    cli("summary", "out.pth")
    assert blueprint_cache.entries() == kept


def test_the_model_that_a_recipe_starts_with_is_cached(cli: Cli) -> None:
    """Completion then knows its paths. A dry run and a user's class are not cached."""
    cli("load", "squeezenet1_1", "--dry-run")
    cli("load", "nets.py:Net")
    assert blueprint_cache.entries() == []
    cli("load", "squeezenet1_1")
    (entry,) = blueprint_cache.entries()
    written = entry.stat().st_mtime_ns
    cli("summary", "squeezenet1_1")
    cli("load", "squeezenet1_1")
    assert [path.stat().st_mtime_ns for path in blueprint_cache.entries()] == [written]


def test_values_are_drawn_anew(cli: Cli) -> None:
    words = ("params", "Linear(2,1)", "--values", "--json")
    cli("params", "Linear(2,1)")
    assert cli(*words, "--seed", 1).json != cli(*words, "--seed", 2).json


@pytest.mark.parametrize("how", ["cut", "flip", "empty", "foreign", "json", "text", "folder"])
def test_a_damaged_entry_is_ignored_and_rebuilt(cli: Cli, how: str) -> None:
    expected = cli("modules", "squeezenet1_1", "--json").json
    path = entry()
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    damaged = {"cut": good[: len(good) // 2], "flip": bytes(flipped), "empty": b"", "text": b"hello\nworld"}
    damaged |= {"json": b"x\n{}", "foreign": good.replace(b"squeezenet1_1", b"squeezenet1_0")}
    if how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(damaged[how])
    assert cli("modules", "squeezenet1_1", "--json").json == expected
    if how != "folder":
        assert path.read_bytes() == good


def test_an_entry_of_another_key_is_ignored(folder: Path) -> None:
    """The file of one key, digest included, is stored under another key."""
    blueprint_cache.put(KEY, BLUEPRINT)
    moved = entry()
    other = Key("vgg16", None, None, (), "eval")
    blueprint_cache.put(other, BLUEPRINT)
    (place,) = set(blueprint_cache.entries()) - {moved}
    place.write_bytes(moved.read_bytes())
    assert blueprint_cache.get(other) is None


def test_a_cache_that_cannot_be_written_is_no_error(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("MODELCLI_CACHE", str(folder / "file"))
    cli("modules", "squeezenet1_1")
    result = cli("cache", "warm", "squeezenet1_1", code=5)
    assert f"the cache folder {folder / 'file'} cannot be written: " in result.err
    assert "set $MODELCLI_CACHE to another folder" in result.err


def _put_and_get(number: int) -> bool:
    for _ in range(30):
        blueprint_cache.put(KEY, BLUEPRINT)
        if blueprint_cache.get(KEY) != BLUEPRINT:
            return False
    return True


def test_concurrent_runs(folder: Path) -> None:
    # If a process is killed, an executor raises; a multiprocessing pool would wait for ever.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert all(pool.map(_put_and_get, range(4)))
    assert len(blueprint_cache.entries()) == 1


@pytest.mark.parametrize("how", ["option", "variable"])
def test_without_the_cache(cli: Cli, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "variable":
        monkeypatch.setenv("MODELCLI_NO_CACHE", "1")
    cli("modules", "Linear(2,3)", *(["--no-cache"] if how == "option" else []))
    assert blueprint_cache.entries() == []


def test_the_cache_command(cli: Cli, folder: Path) -> None:
    assert cli("cache", "path", "--json").json == {
        "schema": 1,
        "path": str(blueprint_cache.folder()),
        "entries": 0,
        "bytes": 0,
    }
    document = cli("cache", "warm", "squeezenet*", "--json").json
    assert document["entries"] == 2
    assert document["bytes"] == sum(path.stat().st_size for path in blueprint_cache.entries())
    (blueprint_cache.folder() / "mine.txt").write_text("not an entry")
    assert "removed 2 entries" in cli("cache", "clear").err
    assert [path.name for path in blueprint_cache.folder().iterdir()] == ["mine.txt"]


def test_the_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MODELCLI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert blueprint_cache.folder() == tmp_path / "modelcli" / "blueprints"
