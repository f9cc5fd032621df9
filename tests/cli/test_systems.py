"""Conditions of the system: full disks, other users, concurrent runs, pipes, signals, an untrusted folder, and packages
that are not installed."""

from __future__ import annotations

import contextlib
import json
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

from modelcli import recipe
from modelcli.cli import main
from modelcli.commands import blueprint_cache
from modelcli.errors import SystemFailureError
from modelcli.files import atomic, locks
from tests.conftest import Cli
from tests.files.test_atomic import temporaries

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
    """Fail after some seconds instead of waiting for ever for a pipe without a writer."""

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
    """Return a recipe of 14 KB, which is more than the small disk has free."""
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


def test_with_a_full_disk_no_recipe_and_no_cache_entry_is_created(
    small_disk: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELCLI_CACHE", str(small_disk / "cache"))
    (small_disk / "cache").mkdir()
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    assert "No space left on device" in cli("load", "Linear(2,3)", code=5).err
    assert not (small_disk / "modelcli.toml").exists()
    cli("summary", "Linear(2,3)")
    assert [path for path in (small_disk / "cache").rglob("*") if path.is_file()] == []


def test_a_partial_write_is_continued(tmp_path: Path) -> None:
    """The write() of an unbuffered file may write only a part of the data, and returns how much it wrote."""
    program = (
        "import resource, signal, sys; from pathlib import Path; from modelcli.files import atomic\n"
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
def test_a_symlink_at_the_new_files_name_is_not_written_through(tmp_path: Path) -> None:
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
def test_a_symlink_swapped_in_at_the_last_moment_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The swap happens between looking the name up and changing owner and mode, which must apply to the open file."""
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
def test_a_symlink_that_replaces_the_folder_is_not_followed(tmp_path: Path, is_folder: bool) -> None:
    """The file is written into the folder that was opened, even if that has been moved since."""
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
def test_a_symlink_that_replaces_the_new_folder_is_not_followed(tmp_path: Path) -> None:
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
def test_a_recipe_that_stays_locked_is_an_error(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("load", "Linear(2,3)")
    before = (folder / "modelcli.toml").read_bytes()
    monkeypatch.setattr(recipe, "PATIENCE", 0.2)
    with (folder / "modelcli.toml").open("rb") as other:
        assert locks.try_to_lock(other.fileno())
        error = cli("freeze", ".", code=5).err
    assert "another command has been using modelcli.toml for 0 s" in error
    assert (folder / "modelcli.toml").read_bytes() == before
    cli("freeze", ".")


def test_locks_on_a_file_system_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a lock is a separate file. One that a killed process left behind expires."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    path, lock = tmp_path / "modelcli.toml", tmp_path / ".modelcli.toml.lock"
    with locks.held(path, 1):
        assert not lock.exists()  # there is no recipe that could be changed
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
def test_the_second_of_two_concurrent_edits_in_place_fails(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, words: tuple[str, ...]
) -> None:
    """This holds even if the edit copies no byte of the file, because its result is based on the old file."""
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


# --- names like those of temporary files, and pipes ----------------------------------------------------------------


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
def test_a_pipe_with_the_name_of_a_temporary_file_does_not_block(cli: Cli, folder: Path, out: str) -> None:
    name = f".{out.rstrip('/')}.0123abcd{atomic.TEMPORARY}"
    os.mkfifo(folder / name)
    with within(60):
        cli("save", out, "-m", "Linear(2,3)")
    assert stat.S_ISFIFO((folder / name).stat().st_mode)


def test_the_cache_is_written_whole(folder: Path, cli: Cli) -> None:
    cli("modules", "Linear(2,3)")
    (entry,) = blueprint_cache.entries()
    digest, _, body = entry.read_bytes().partition(b"\n")
    assert digest.decode() == blueprint_cache._digest(body)


def test_only_modelclis_own_temporary_files_are_skipped_and_removed(cli: Cli, folder: Path) -> None:
    """Files that merely end like temporary files are copied with a folder, and are kept in the cache's folder."""
    torch.save({"w": torch.ones(2)}, "in.pth")
    (folder / "out").mkdir()
    (folder / "out" / f"mine{atomic.TEMPORARY}").touch()
    (folder / "out" / f".m.pth.0123abcd{atomic.TEMPORARY}").touch()
    cli("save", "out/", "-m", "in.pth", "--force")
    assert (folder / "out" / f"mine{atomic.TEMPORARY}").exists()
    assert not (folder / "out" / f".m.pth.0123abcd{atomic.TEMPORARY}").exists()
    cli("modules", "Linear(2,3)")
    (entry,) = blueprint_cache.entries()
    left = blueprint_cache.folder() / f".{entry.name}.0123abcd{atomic.TEMPORARY}"
    others = [blueprint_cache.folder() / name for name in ("mine.blueprint", "mine.index", f"mine{atomic.TEMPORARY}")]
    for path in (left, *others):
        path.touch()
    cli("cache", "clear")
    assert sorted(blueprint_cache.folder().iterdir()) == sorted(others)


@posix_only
@pytest.mark.parametrize(
    "words",
    [
        ("summary", "./pipe"),
        ("params", "pipe.pth"),
        ("summary", "pipe.py:Net"),
        ("summary", "shards/"),
        ("summary", "index/"),
        ("summary", "Linear(2,3)", "--weights", "pipe.pth"),
        ("log", "--recipe", "socket"),
        ("log", "--recipe", "/dev/zero"),
        ("diff", "pipe.pth", "pipe.pth"),
        ("save", "pipe.pth", "-m", "Linear(2,3)", "--force"),
        ("save", "/dev/null", "-m", "Linear(2,3)", "--force"),
        ("load", "Linear(2,3)", "--recipe", "pipe.toml", "--force"),
    ],
    ids=" ".join,
)
def test_pipes_and_devices_do_not_block(cli: Cli, folder: Path, words: tuple[str, ...]) -> None:
    import socket

    (folder / "shards").mkdir()
    (folder / "index").mkdir()
    index = '{"metadata": {}, "weight_map": {"a": "model.safetensors"}}'
    (folder / "shards" / "model.safetensors.index.json").write_text(index)
    pipes = ["pipe", "pipe.pth", "pipe.py", "pipe.toml", "shards/model.safetensors"]
    for name in [*pipes, "index/model.safetensors.index.json"]:
        os.mkfifo(folder / name)
    with socket.socket(socket.AF_UNIX) as server, within(60):
        server.bind("socket")
        found = main(list(words))
    assert found in (2, 4, 5)
    told = cli.capsys.readouterr().err
    assert "error: " in told
    assert "a bug in modelcli" not in told


@posix_only
def test_a_pipe_in_the_cache_or_in_a_folder_that_is_replaced(cli: Cli, folder: Path) -> None:
    cli("modules", "Linear(2,3)")
    (entry,) = blueprint_cache.entries()
    entry.unlink()
    os.mkfifo(entry)
    (folder / "out").mkdir()
    os.mkfifo(folder / "out" / "pytorch_model.bin.index.json")
    with within(60):
        cli("modules", "Linear(2,3)")
        cli("save", "out/", "-m", "Linear(2,3)", "--force")
    assert cli("params", "out/", "--json").json["tensors"][0]["shape"] == [3, 2]


@posix_only
def test_a_recipe_may_come_through_a_pipe(folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, "m.pth")
    lines = "echo 'edits = [\"cast . half\"]'"
    line = f"{' '.join(PROGRAM)} apply <(sleep 0.2; {lines}) -m m.pth -f csv; {' '.join(PROGRAM)} apply - -m m.pth <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert "float16" in done.stdout
    assert "no edits on standard input: it is closed" in done.stderr
    assert done.returncode == 2


# --- faults outside of modelcli ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["key.pth", "beside.pth", "inside.pth"])
@pytest.mark.parametrize(
    "words",
    [("params",), ("summary", "--json"), ("check", "--safe"), ("save", "o.safetensors", "-m"), ("diff", "key.pth")],
    ids=" ".join,
)
def test_an_integer_of_6000_digits_is_reported_as_a_fault_of_the_file(
    cli: Cli, name: str, words: tuple[str, ...]
) -> None:
    state = {"a": torch.ones(2)}
    torch.save(state | {10**6000: torch.ones(1)}, "key.pth")
    torch.save({"state_dict": state, 10**6000: 1}, "beside.pth")
    torch.save({"state_dict": state, "epoch": [10**6000]}, "inside.pth")
    told = cli(*words, name, code=4).err
    assert "holds an integer of 2,492 bytes" in told
    with pytest.raises(Exception, match="weights_only"):  # torch cannot read it either
        torch.load(name, weights_only=True)


def test_the_longest_integer_that_torch_reads(cli: Cli) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "n": 2**2039 - 1, "m": -(2**2038)}, "n.pth")
    assert torch.load("n.pth", weights_only=True)["n"] == 2**2039 - 1
    cli("cast", ".", "half", "-m", "n.pth", "-o", "o.pth")
    assert torch.load("o.pth", weights_only=True)["m"] == -(2**2038)


@pytest.mark.parametrize("what", ["modules", "tensors"])
@pytest.mark.parametrize("words", [("summary",), ("params", "--stats"), ("diff", "o.pth"), ("save", "x.pth", "-m")])
def test_a_record_that_lists_a_path_twice_is_ignored(cli: Cli, what: str, words: tuple[str, ...]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    cli("save", "o.pth", "-m", "Sequential(Linear(2,3))")
    cli("save", "o.safetensors", "-m", "o.pth")
    with safe_open("o.safetensors", "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    document = json.loads(metadata["modelcli"])
    listed = document["blueprint"][what]
    listed.append(listed[-1])
    save_file(state, "twice.safetensors", metadata | {"modelcli": json.dumps(document)})
    cli.capsys.readouterr()
    found = main([*words, "twice.safetensors"])
    told = cli.capsys.readouterr().err
    assert found == 0, told
    assert "a bug in modelcli" not in told


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a limit of addresses is heeded on Linux")
def test_torch_that_does_not_fit_into_memory(folder: Path) -> None:
    line = f"ulimit -v 600000; {' '.join(PROGRAM)} save o.pth -m 'Linear(2,3)'"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "cannot be imported: " in done.stderr or "not enough memory" in done.stderr
    assert "a limit of 614 MB of memory is set" in done.stderr
    assert "ulimit -v unlimited removes the limit" in done.stderr
    assert "a bug in modelcli" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="users of Windows have a folder")
def test_a_user_without_a_home_folder(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(_uid: int) -> object:
        raise KeyError("getpwuid(): uid not found: 12345")

    for name in ("HOME", "XDG_CACHE_HOME", "MODELCLI_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    torch.save({"a": torch.ones(2)}, "m.pth")
    for words in (["summary", "m.pth"], ["summary", "Linear(2,3)"], ["save", "o.pth", "-m", "Linear(2,3)"]):
        cli(*words)
    for words in (["cache", "path"], ["cache", "clear"], ["cache", "warm", "squeezenet1_1"]):
        told = cli(*words, code=5).err
        assert "there is no cache: this user has no home folder" in told
        assert "$MODELCLI_CACHE" in told
    assert sorted(path.name for path in folder.iterdir()) == ["m.pth", "nets.py", "o.pth"]


@posix_only
def test_a_home_folder_that_cannot_be_written(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELCLI_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nobody")
    cli("summary", "Linear(2,3)")


# --- the current folder is not to be trusted -----------------------------------------------------------------------

PLANTED = "open('PWNED', 'w').close()\nraise SystemExit('planted')\n"


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_a_file_in_the_current_folder_does_not_replace_a_package(folder: Path, safe_path: str) -> None:
    """`python -m` puts the current folder first."""
    names = ("torch", "numpy", "torchvision", "typer", "rich", "tomlkit", "safetensors", "platformdirs", "fcntl")
    names += ("typing", "re", "enum", "dataclasses")
    for name in names:
        (folder / f"{name}.py").write_text(PLANTED)
    settings = os.environ | {"PYTHONSAFEPATH": safe_path}
    done = subprocess.run(
        [*PROGRAM, "save", "o.safetensors", "-m", "nets.py:Net"], capture_output=True, text=True, env=settings
    )
    assert (done.returncode, (folder / "PWNED").exists()) == (0, False), done.stderr


def test_the_folder_of_a_reference_comes_last(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed packages take precedence over modules beside a named file; other modules there are found."""
    installed = folder / "site"
    installed.mkdir()
    (installed / "a_package.py").write_text("import its_dependency\nfrom nets import Net\n")
    (installed / "its_dependency.py").write_text("")
    monkeypatch.setattr(sys, "path", ["", *sys.path, str(installed)])
    for name in ("its_dependency", "torchvision", "numpy", "a_package"):
        (folder / f"{name}.py").write_text(PLANTED)
    (folder / "sibling.py").write_text("from nets import Net\n")
    (folder / "own.py").write_text("import its_dependency, torchvision, numpy\nfrom sibling import Net\n")
    for reference in ("own.py:Net", "a_package:Net", "sibling:Net"):
        cli("params", reference, "--json")
    assert not (folder / "PWNED").exists()
    assert sys.path[0] == ""
    assert str(folder) not in sys.path


def test_a_users_file_that_imports_a_missing_package(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text("import torch\nimport surely_nobody_has_it.inside\n")
    told = cli("params", "own.py:Net", code=2).err
    assert "imports surely_nobody_has_it, which is not installed in " in told
    assert sys.executable in told
    assert f"{folder / 'own.py'}:2" in told
    assert "-m pip install surely_nobody_has_it installs it there" in told
    (folder / "own.py").write_text("import torch.surely_not_there\n")
    told = cli("params", "own.py:Net", code=2).err
    assert f"and the torch of {sys.executable} has no such module" in told


def test_a_note_says_once_that_a_recipe_names_python(cli: Cli, folder: Path) -> None:
    said = "names Python code, which runs with your rights, as a Makefile does: nets.py:Net"
    (folder / "modelcli.toml").write_text('model = "nets.py:Net"\nedits = []\n')
    assert said in cli("params").err
    assert said not in cli("params").err
    (folder / "modelcli.toml").write_text('model = "nets.py:Net"\nedits = ["replace linear nets:Places()"]\n')
    found = main(["params"])
    assert "as a Makefile does: nets.py:Net, nets:Places" in cli.capsys.readouterr().err, found
    (folder / "other.toml").write_text('model = "nets.py:Nothing"\n')
    told = cli("params", "--recipe", "other.toml", code=2).err
    assert "other.toml names Python" in told  # an error does not hide the note
    (folder / "plain.toml").write_text('model = "Linear(2,3)"\n')
    assert "Python" not in cli("params", "--recipe", "plain.toml").err


def test_no_note_if_the_user_names_the_python_file(cli: Cli, folder: Path) -> None:
    cli("load", "nets.py:Places")
    assert "names Python" not in cli("params").err
    cli("freeze", "fc")
    assert "names Python" not in cli("params").err


def test_without_a_cache_each_run_notes_that_the_recipe_names_python(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELCLI_NO_CACHE", "1")
    (folder / "modelcli.toml").write_text('model = "nets.py:Net"\n')
    for _ in range(2):
        assert "names Python" in cli("params").err


# --- Ctrl-C --------------------------------------------------------------------------------------------------------

#: A program that sends Ctrl-C when a module is imported: where the import begins, or inside a callback.
PRESSED = """
import builtins, signal, sys
at, how = sys.argv.pop(1), sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)

class Pressing:
    def find_spec(self, name, path=None, target=None):
        if name == at:
            sys.meta_path.remove(self)
            if how == "lost":
                try:
                    signal.raise_signal(signal.SIGINT)
                except BaseException:
                    pass
            elif how == "changed":
                try:
                    signal.raise_signal(signal.SIGINT)
                except BaseException:
                    raise ImportError("initialization failed") from None
            elif how == "callback":
                class Late:
                    def __del__(self):
                        signal.raise_signal(signal.SIGINT)
                Late()
            else:
                signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Pressing())
from modelcli.start import run
run()
"""


@posix_only
@pytest.mark.parametrize(
    ("module", "how"),
    [
        ("modelcli.cli", "raised"),
        ("modelcli.cli.main", "raised"),
        ("typer", "raised"),
        ("modelcli.cli.app", "raised"),
        ("modelcli.commands", "raised"),
        ("modelcli.commands", "lost"),
        ("modelcli.commands", "changed"),
        ("modelcli.commands", "callback"),
        ("torch", "raised"),
        ("torch.nn", "changed"),
        ("torch.nn", "lost"),
        ("modelcli.live.trace", "callback"),
    ],
)
def test_ctrl_c_at_any_moment_of_start_up(folder: Path, module: str, how: str) -> None:
    words = ["summary", "Linear(2,3)", "--no-cache"]
    done = subprocess.run([sys.executable, "-c", PRESSED, module, how, *words], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr in ("", "interrupted\n")


@posix_only
def test_ctrl_c_after_some_time(folder: Path) -> None:
    """The signal comes from another process at any time, also before the code of modelcli runs.

    Before Python has started, it ends the process silently; while Python imports modules of its own, with code 1.
    """
    for delay in (0.0, 0.1, 0.2, 0.4, 0.8, 1.6):
        run = subprocess.Popen(
            [*PROGRAM, "summary", "Linear(2,3)", "--no-cache"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        time.sleep(delay)
        run.send_signal(signal.SIGINT)
        _, told = run.communicate(timeout=120)
        if told not in ("", "interrupted\n"):
            assert "modelcli" not in told
            assert run.returncode in (1, 130, -signal.SIGINT), told
        else:
            assert run.returncode in (0, 130, -signal.SIGINT), told


# --- a file that is cut short while it is read ---------------------------------------------------------------------

#: A program that truncates a file just before modelcli reads values from it, as another program might.
CUT = """
import os, sys
from modelcli.values import reading
from modelcli.cli import main

left = [2]

def cut(original):
    def read(*arguments):
        left[0] -= 1
        if not left[0]:
            os.truncate("m.pth", 4096)
        return original(*arguments)
    return read

reading.memory_of = cut(reading.memory_of)
reading.Reader.bytes = cut(reading.Reader.bytes)
raise SystemExit(main(sys.argv[1:]))
"""


@posix_only
@pytest.mark.parametrize(
    "words",
    [
        ("params", "m.pth", "--stats"),
        ("params", "m.pth", "--values"),
        ("params", "m.pth", "--values", "--json"),
        ("check", "m.pth", "--finite"),
        ("diff", "other.pth", "m.pth", "--atol", "0.1"),
        ("cast", ".", "half", "-m", "m.pth", "-o", "o.pth"),
    ],
    ids=lambda words: words[0],
)
def test_a_file_truncated_during_reading_is_an_error(folder: Path, words: tuple[str, ...]) -> None:
    """Reading a memory-mapped part behind the new end would kill the process by SIGBUS, without a message."""
    state = {f"w{number}": torch.randn(500_000) for number in range(4)}
    torch.save(state, "m.pth")
    torch.save({name: tensor + 1 for name, tensor in state.items()}, "other.pth")
    done = subprocess.run([sys.executable, "-c", CUT, *words], capture_output=True, text=True)
    assert done.returncode == 4, (done.returncode, done.stderr)
    assert "m.pth changed while it was being read" in done.stderr or "m.pth ends early" in done.stderr
    assert not Path("o.pth").exists()


@pytest.mark.parametrize("size", [3, 40_000])
def test_small_tensors_that_are_read_together_have_the_right_values(cli: Cli, size: int) -> None:
    state = {f"w{number}": torch.randn(size) for number in range(40)} | {"big": torch.randn(400_000)}
    torch.save(state, "m.pth")
    rows = {row["name"]: row for row in cli("params", "m.pth", "--stats", "--values", "--json").json["tensors"]}
    for name, tensor in state.items():
        assert rows[name]["stats"]["mean"] == pytest.approx(tensor.double().mean().item(), abs=1e-12)
        assert rows[name]["stats"]["max"] == tensor.max().item()
        assert torch.equal(torch.tensor(rows[name]["values"]), tensor)


# --- packages that are not installed -------------------------------------------------------------------------------

#: modelcli in a Python without certain packages.
WITHOUT = """
import sys

class Missing:
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing(sys.argv.pop(1).split(",")))
from modelcli.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_without_torch(folder: Path, cli: Cli) -> None:
    """Commands that do not need torch work, and the others end with exit code 5 and say what they need."""
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, "m.pth")
    cli("save", "s.safetensors", "-m", "Sequential(Linear(2,3))")
    for code, *words in (
        (0, "--version"),
        (0, "summary", "m.pth"),
        (0, "params", "s.safetensors", "--json"),
        (0, "modules", "s.safetensors"),
        (0, "check", "m.pth", "--max-params", "10", "--finite"),
        (0, "params", "m.pth", "--stats", "--values"),
        (1, "diff", "m.pth", "s.safetensors"),
        (0, "freeze", "a", "-m", "m.pth", "-o", "o.pth"),
        (0, "cast", ".", "half", "-m", "m.pth", "-o", "half.pth"),
        (5, "save", "new.pth", "-m", "Linear(2,3)"),
        (5, "summary", "alexnet"),
    ):
        run = [sys.executable, "-c", WITHOUT, "torch,torchvision,torchinfo", *words]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        if code == 5:
            assert done.stderr.startswith("error: this needs torch: pip install torch\n")
            assert sys.executable in done.stderr
