"""What the system around the program does: full disks, other users and other runs at the same time, pipes, signals,
a folder that is not to be trusted, and packages that are not installed."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modelcli import atomic, cache, locks, recipe
from modelcli.errors import SystemFailureError
from tests.conftest import Cli
from tests.test_atomic import temporaries

PROGRAM = [sys.executable, "-m", "modelcli"]
posix_only = pytest.mark.skipif(os.name != "posix", reason="pipes, links and signals of POSIX")


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 32 KB, as the current folder."""
    disk = folder / "disk"
    disk.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("root alone can mount a file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    os.chdir(disk)
    try:
        yield disk
    finally:
        os.chdir(folder)
        subprocess.run(["umount", "-l", str(disk)], check=True)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail, rather than wait without end for a pipe that nobody writes to."""

    def late(_number: int, _frame: object) -> None:
        raise AssertionError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- small files of ours -------------------------------------------------------------------------------------------


def long_recipe() -> str:
    """A recipe of 14 KB: not much, and more than is free."""
    lines = "".join(f'    "{word}freeze weight", # {"x" * 60}\n' for _ in range(80) for word in ("", "un"))
    return f'model = "Linear(2,2)"\nedits = [\n{lines}]\n'


def test_a_full_disk_leaves_the_recipe(small_disk: Path, cli: Cli) -> None:
    (small_disk / "modelcli.toml").write_text(long_recipe())
    before = (small_disk / "modelcli.toml").read_bytes()
    assert 13_000 < len(before) < 20_000
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 8192))
    assert os.statvfs(small_disk).f_bavail == 2
    error = cli("freeze", "bias", code=5).err
    assert "cannot write modelcli.toml: No space left on device" in error
    assert (small_disk / "modelcli.toml").read_bytes() == before
    assert temporaries(small_disk) == []
    (small_disk / "filler").unlink()
    assert "freeze bias" in cli("freeze", "bias", "--json").out
    assert b"freeze bias" in (small_disk / "modelcli.toml").read_bytes()


def test_a_full_disk_takes_no_new_recipe_and_no_cache(
    small_disk: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELCLI_CACHE", str(small_disk / "cache"))
    (small_disk / "cache").mkdir()
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    assert "No space left on device" in cli("load", "Linear(2,3)", code=5).err
    assert not (small_disk / "modelcli.toml").exists()
    cli("summary", "Linear(2,3)")
    assert [path for path in (small_disk / "cache").rglob("*") if path.is_file()] == []


def test_a_cut_write_goes_on(tmp_path: Path) -> None:
    """An unbuffered file may take a part of what it is given, and says so by a number that nobody looked at."""
    program = (
        "import resource, signal, sys; from pathlib import Path; from modelcli import atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "with atomic.replacing(Path(sys.argv[1]), force=True) as (file, _): file.write(bytes(14000))\n"
    )
    path = tmp_path / "small"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert path.read_bytes() == b"old"
    assert temporaries(tmp_path) == []


# --- another user in the same folder -------------------------------------------------------------------------------


@posix_only
def test_a_link_in_the_place_of_the_new_file_gets_nothing(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "m.pth"
    victim.write_text("of root alone")
    victim.chmod(0o600)
    path.write_text("old")
    path.chmod(0o666)
    if os.geteuid() == 0:
        os.chown(path, 1234, 2345)

    def write() -> None:
        with atomic.replacing(path, force=True) as (file, temporary):
            file.write(b"new")
            temporary.rename(tmp_path / "taken")
            temporary.symlink_to(victim)

    with pytest.raises(SystemFailureError, match="another program has put something else in the place of"):
        write()
    status = victim.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.geteuid())
    assert (victim.read_text(), path.read_text()) == ("of root alone", "old")
    assert stat.S_IMODE((tmp_path / "taken").stat().st_mode) == 0o600


@posix_only
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone can give files away")
def test_a_link_that_is_swapped_in_at_the_last_moment_gets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the name and what is done to the file: owner and mode go to the file that is open."""
    victim, path = tmp_path / "victim", tmp_path / "m.pth"
    victim.write_text("of root alone")
    victim.chmod(0o600)
    path.write_text("old")
    os.chown(path, 1234, 2345)
    original = os.chown

    def swapped(*args: object, **options: object) -> None:
        (temporary,) = tmp_path.glob(f".m.pth.*{atomic.TEMPORARY}")
        temporary.unlink()
        temporary.symlink_to(victim)
        original(*args, **options)

    monkeypatch.setattr(os, "chown", swapped)
    with atomic.replacing(path, force=True) as (file, _):
        file.write(b"new")
    assert (victim.stat().st_uid, stat.S_IMODE(victim.stat().st_mode)) == (0, 0o600)


@posix_only
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path: Path, is_folder: bool) -> None:
    """What is written lands in the folder that was opened, wherever that is by now."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()

    def swap() -> None:
        (tmp_path / "runs").rename(tmp_path / "moved")
        (tmp_path / "runs").symlink_to("elsewhere")

    if is_folder:
        with atomic.replacing_folder(tmp_path / "runs" / "m", force=True) as new:
            swap()
            (new / "a").write_text("new")
        assert (tmp_path / "moved" / "m" / "a").read_text() == "new"
    else:
        with atomic.replacing(tmp_path / "runs" / "m", force=True) as (file, _):
            swap()
            file.write(b"new")
        assert (tmp_path / "moved" / "m").read_text() == "new"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="a folder is reached by its handle on Linux")
def test_a_link_in_the_place_of_the_new_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()

    def write() -> None:
        with atomic.replacing_folder(tmp_path / "m", force=True) as new:
            (temporary,) = tmp_path.glob(f".m.*{atomic.TEMPORARY}")
            temporary.rename(tmp_path / "taken")
            temporary.symlink_to("elsewhere")
            (new / "a").write_text("new")

    with pytest.raises(SystemFailureError, match="another program has put something else in the place of"):
        write()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "m").exists()


# --- several commands at once --------------------------------------------------------------------------------------


@posix_only
def test_four_edits_at_once_are_all_in_the_recipe(folder: Path, cli: Cli) -> None:
    cli("load", f"Sequential({','.join(['Linear(2,2)'] * 4)})")
    runs = [subprocess.Popen([*PROGRAM, "freeze", str(number)], stdout=subprocess.DEVNULL) for number in range(4)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0, 0, 0]
    assert sorted(map(str, recipe.read(folder / "modelcli.toml").edits)) == [f"freeze {n}" for n in range(4)]
    assert temporaries(folder) == []
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


@posix_only
def test_many_appends_at_once_lose_none(folder: Path, cli: Cli) -> None:
    (folder / "modelcli.toml").write_text('model = "alexnet"\nedits = []\n')
    program = (
        "import sys; from pathlib import Path; from modelcli import edits, recipe\n"
        "path = Path('modelcli.toml')\n"
        "for number in range(5):\n"
        "    with recipe.locked(path):\n"
        "        recipe.read(path); recipe.append(path, [edits.parse(f'freeze x{sys.argv[1]}.{number}')])\n"
    )
    runs = [subprocess.Popen([sys.executable, "-c", program, str(number)]) for number in range(4)]
    assert [run.wait(timeout=120) for run in runs] == [0] * 4
    found = sorted(map(str, recipe.read(folder / "modelcli.toml").edits))
    assert found == [f"freeze x{a}.{b}" for a in range(4) for b in range(5)]


@posix_only
def test_a_recipe_that_stays_locked_is_told(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("load", "Linear(2,3)")
    before = (folder / "modelcli.toml").read_bytes()
    monkeypatch.setattr(recipe, "PATIENCE", 0.2)
    with (folder / "modelcli.toml").open("rb") as other:
        assert locks.try_to_lock(other.fileno())
        error = cli("freeze", ".", code=5).err
    assert "another command has been at work on modelcli.toml for 0 s" in error
    assert (folder / "modelcli.toml").read_bytes() == before
    cli("freeze", ".")


def test_where_open_files_have_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock is a file of its own there; one that a killed run has left does not stand in the way for ever."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    path, lock = tmp_path / "modelcli.toml", tmp_path / ".modelcli.toml.lock"
    with locks.held(path, 1):
        assert not lock.exists()  # nothing is there that could be changed
    path.write_text("x")
    with locks.held(path, 1):
        assert lock.exists()
        told: list[int] = []
        with pytest.raises(TimeoutError), locks.held(path, 0.2, lambda: told.append(1)):
            raise AssertionError
        assert told == [1]
    assert not lock.exists()
    lock.touch()
    os.utime(lock, (time.time() - locks.STALE - 1,) * 2)
    with locks.held(path, 5):
        assert lock.exists()
    assert not lock.exists()


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m/"])
@pytest.mark.parametrize("words", [("cast", ".", "half"), ("freeze", "0"), ("replace", "*", "Linear(2,2)")])
def test_of_two_edits_in_place_the_second_says_so(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, words: tuple[str, ...]
) -> None:
    """Nor where it takes over no byte of the file: what it makes of the file is not what is there by now."""
    cli("save", name, "-m", "Sequential(Linear(2,2),Linear(2,2))")
    other = ["cast", "1.weight", "half", "-m", name if name != "m/" else "./m", "-o", name, "--force"]
    original, began = atomic._alone, list[bool]()

    def late(*args: object) -> object:
        if not began:
            began.append(True)
            cli(*other)
        return original(*args)

    monkeypatch.setattr(atomic, "_alone", late)
    check = ["--check", "none"]
    error = cli(*words, "-m", name if name != "m/" else "./m", "-o", name, "--force", *check, code=4).err
    assert "changed while it was being read" in error
    assert "run the command again" in error
    rows = cli("params", name if name != "m/" else "./m", "--json").json["tensors"]
    assert {row["name"]: row["dtype"] for row in rows}["1.weight"] == "float16"
    assert len(rows) == 4
    assert temporaries(Path()) == []


# --- names that only look like ours, and what is no file -----------------------------------------------------------


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_temporaries_of_another_folder_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_names: False)
    others = [f".out.bak.00000000{atomic.TEMPORARY}", f".out.bak.00000000.old{atomic.TEMPORARY}"]
    others += [f".out.0000000{atomic.TEMPORARY}", f".out.old{atomic.TEMPORARY}", f".out.ABCDEFGH{atomic.TEMPORARY}"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    own = tmp_path / f".out.00000000{atomic.TEMPORARY}"
    own.mkdir()
    for _ in range(2):
        with atomic.replacing_folder(tmp_path / "out", force=True) as new:
            (new / "a").touch()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*others, "out"])
    assert all((tmp_path / name / "kept").exists() for name in others)


def test_long_names_that_begin_alike_have_temporaries_of_their_own(tmp_path: Path) -> None:
    one, other = "a" * 120 + ".pth", "a" * 121 + ".pth"
    left = tmp_path / f".{atomic._stem(one)}.00000000{atomic.TEMPORARY}"
    left.touch()
    for name in (other, "a" * 100):
        with atomic.replacing(tmp_path / name, force=True) as (file, _):
            file.write(b"new")
        assert left.exists()
    with atomic.replacing(tmp_path / one, force=True) as (file, _):
        file.write(b"new")
    assert not left.exists()


@posix_only
@pytest.mark.parametrize("out", ["out.pth", "out/"])
def test_a_pipe_with_the_name_of_a_temporary_holds_nothing_up(cli: Cli, folder: Path, out: str) -> None:
    name = f".{out.rstrip('/')}.0123abcd{atomic.TEMPORARY}"
    os.mkfifo(folder / name)
    with within(60):
        cli("save", out, "-m", "Linear(2,3)")
    assert stat.S_ISFIFO((folder / name).stat().st_mode)


def test_the_cache_is_written_whole(folder: Path, cli: Cli) -> None:
    cli("modules", "Linear(2,3)")
    (entry,) = cache.entries()
    digest, _, body = entry.read_bytes().partition(b"\n")
    assert digest.decode() == cache._digest(body)


def test_only_names_of_our_own_are_left_out_and_cleared(cli: Cli, folder: Path) -> None:
    """What only ends as ours do goes along with a folder, and stays in the cache's."""
    torch.save({"w": torch.ones(2)}, "in.pth")
    (folder / "out").mkdir()
    (folder / "out" / f"mine{atomic.TEMPORARY}").touch()
    (folder / "out" / f".m.pth.0123abcd{atomic.TEMPORARY}").touch()
    cli("save", "out/", "-m", "in.pth", "--force")
    assert (folder / "out" / f"mine{atomic.TEMPORARY}").exists()
    assert not (folder / "out" / f".m.pth.0123abcd{atomic.TEMPORARY}").exists()
    cli("modules", "Linear(2,3)")
    (entry,) = cache.entries()
    left = cache.folder() / f".{entry.name}.0123abcd{atomic.TEMPORARY}"
    others = [cache.folder() / name for name in ("mine.blueprint", "mine.index", f"mine{atomic.TEMPORARY}")]
    for path in (left, *others):
        path.touch()
    cli("cache", "clear")
    assert sorted(cache.folder().iterdir()) == sorted(others)
