"""Files and folders are replaced in one step: at every moment the old one or the new one exists, complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modelcli import checkpoints
from modelcli.checkpoints.sharded import writing as shards
from modelcli.checkpoints.storage import Span
from modelcli.cli import main
from modelcli.errors import RequestError, SystemFailureError
from modelcli.files import atomic
from tests import torture
from tests.benchmarks.bench_writing import sparse_pth
from tests.conftest import Cli

posix_only = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")


def digest(path: Path) -> str:
    """Return the bytes of a file, or the names and bytes of every file of a folder."""
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            found.update(str(file.relative_to(path.parent)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def temporaries(folder: Path) -> list[str]:
    return [entry.name for entry in folder.rglob(f"*{atomic.TEMPORARY}")]


# --- folders -------------------------------------------------------------------------------------------------------


def fill(path: Path, files: dict[str, str], **options: Any) -> None:
    with atomic.replacing_folder(path, force=True, superseded=shards.superseded, **options) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def held(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def test_a_folder_has_no_shard_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    fill(path, {"model-00001-of-00002.safetensors": "1", "model-00002-of-00002.safetensors": "2"})
    (path / "tokenizer.json").write_text("{}")
    (path / "assets").mkdir()
    (path / "assets" / "deep.txt").write_text("x")
    fill(path, {"model-00001-of-00001.safetensors": "new"})
    assert held(path) == {
        "model-00001-of-00001.safetensors": "new",
        "tokenizer.json": "{}",
        "assets/deep.txt": "x",
    }
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize(
    "old",
    [
        {"pytorch_model.bin.index.json": '{"weight_map": {"a": "pytorch_model-1.bin"}}', "pytorch_model-1.bin": "x"},
        {".metadata": "x", "__0_0.distcp": "x", "__1_0.distcp": "x"},
        {"model.safetensors": "x"},
    ],
)
def test_only_the_files_of_the_old_checkpoint_are_removed(tmp_path: Path, old: dict[str, str]) -> None:
    path = tmp_path / "out"
    others = {"precious.safetensors": "x", "pytorch_model.bin": "x", "adapter.distcp.txt": "x"}
    fill(path, old | others)
    fill(path, {"model-00001-of-00001.safetensors": "new"})
    assert held(path) == {"model-00001-of-00001.safetensors": "new"} | others


def test_a_folder_of_bin_shards_is_read_again_when_it_was_written_over(cli: Cli) -> None:
    Path("bin").mkdir()
    torch.save({"a": torch.ones(2)}, "bin/pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    Path("bin/pytorch_model.bin.index.json").write_text(json.dumps(index))
    cli("cast", "a", "half", "-m", "bin/", "-o", "bin/", "--force")
    assert [t["dtype"] for t in cli("params", "bin/", "--json").json["tensors"]] == ["float16"]


@pytest.mark.parametrize("where", ["./", "../", "/"])
def test_the_current_folder_and_those_above_are_refused(cli: Cli, folder: Path, where: str) -> None:
    torch.save({"a": torch.ones(2)}, "in.pth")
    error = cli("save", where, "-m", "in.pth", "--force", code=2).err
    assert "cannot be replaced in one step" in error
    assert "hint: name a folder in it:" in error


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "mounted")
    with pytest.raises(RequestError, match="mounted is a mount point"):
        atomic.check_target(tmp_path / "mounted", force=True, folder=True)


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path).name != "theirs")
    with pytest.raises(SystemFailureError, match="no permission to write in it"):
        atomic.check_target(tmp_path / "theirs", force=True, folder=True)


def test_a_file_that_cannot_be_kept_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", {"note.txt": "x"})

    def refuse(_source: object, _target: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(atomic, "_link_or_copy", refuse)
    with pytest.raises(SystemFailureError, match=r"cannot keep .*note\.txt: Permission denied"):
        fill(tmp_path / "out", {"a.safetensors": "new"})
    assert held(tmp_path / "out") == {"note.txt": "x"}


def interrupt_midway(path: Path) -> None:
    with atomic.replacing_folder(path, force=True) as folder:
        (folder / "a.safetensors").write_text("new")
        raise KeyboardInterrupt


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_failure_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    path = tmp_path / "out"
    fill(path, {"a.safetensors": "old", "note.txt": "kept"})
    before = digest(path)
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_names: False)
    with pytest.raises(KeyboardInterrupt):
        interrupt_midway(path)
    assert digest(path) == before
    assert temporaries(tmp_path) == []
    fill(path, {"a.safetensors": "new"})
    assert held(path) == {"a.safetensors": "new", "note.txt": "kept"}
    assert temporaries(tmp_path) == []


def test_a_rename_that_fails_midway_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system cannot exchange two names and the second rename fails, the first one is undone."""
    path = tmp_path / "out"
    fill(path, {"a.safetensors": "old"})
    before = digest(path)
    monkeypatch.setattr(atomic, "_exchange", lambda *_names: False)
    original = os.rename

    def rename(old: str, new: str, **folders: Any) -> None:
        if new == path.name and not old.endswith(f".old{atomic.TEMPORARY}"):
            raise OSError(errno.EIO, "Input/output error")
        original(old, new, **folders)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(SystemFailureError, match="Input/output error"):
        fill(path, {"a.safetensors": "new"})
    assert digest(path) == before
    assert temporaries(tmp_path) == []


def test_a_run_killed_between_two_renames_is_repaired_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "out"
    fill(path, {"a.safetensors": "old"})
    path.rename(tmp_path / f".out.00000000.old{atomic.TEMPORARY}")
    with pytest.raises(ZeroDivisionError), atomic.replacing_folder(path, force=True):
        raise ZeroDivisionError
    assert held(path) == {"a.safetensors": "old"}


def test_modes_and_links_of_folders(tmp_path: Path) -> None:
    real = tmp_path / "real"
    fill(real, {"a.safetensors": "old"})
    real.chmod(0o750)
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", {"a.safetensors": "new"})
    assert (tmp_path / "link").is_symlink()
    assert held(real) == {"a.safetensors": "new"}
    assert real.stat().st_mode & 0o777 == 0o750


def test_targets_that_are_not_folders(cli: Cli, folder: Path) -> None:
    (folder / "file").write_text("x")
    assert "file is not a folder" in cli("save", "file/", "-m", "nets.py:Net", code=2).err
    os.mkfifo(folder / "pipe")
    assert "is not a folder" in cli("save", "pipe/", "-m", "nets.py:Net", "--force", code=2).err
    cli("save", "out.pth/", "-m", "nets.py:Net")
    assert "out.pth exists" in cli("save", "out.pth/", "-m", "nets.py:Net", code=2).err
    error = cli("save", "out.pth", "-m", "nets.py:Net", "--force", code=2).err
    assert "out.pth is a folder" in error
    assert "end it in a slash: out.pth/" in error


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors", "out/"])
def test_writing_onto_the_input(cli: Cli, out: str) -> None:
    """Also through a second hard link of the file, which keeps the old content."""
    cli("save", out, "-m", "nets.py:Places")
    name = out if out != "out/" else "./out"
    if out != "out/":
        os.link(out, "second")
        shutil.copy(out, "copy")
    cli("replace", "fc", "Linear(4,9)", "-m", name, "--trust", "-o", out, "--force")
    shapes = {row["name"]: row["shape"] for row in cli("params", name, "--json").json["tensors"]}
    assert shapes["fc.weight"] == [9, 4]
    assert out == "out/" or Path("second").read_bytes() == Path("copy").read_bytes()
    if out != "out/":
        Path(f"link{Path(out).suffix}").symlink_to(out)
        cli("freeze", ".", "-m", f"link{Path(out).suffix}", "--trust", "-o", f"link{Path(out).suffix}", "--force")
        assert Path(f"link{Path(out).suffix}").is_symlink()


@pytest.mark.parametrize("out", ["one.pth", "one.safetensors", "one/"])
def test_the_same_command_writes_the_same_bytes(cli: Cli, out: str) -> None:
    torch.save({f"w{number}": torch.randn(100_000) for number in range(4)}, "in.pth")
    digests = set()
    for _ in range(2):
        cli("add", "fc", "Linear(3,2)", "-m", "in.pth", "-o", out, "--force", "--max-shard-size", "900KB")
        digests.add(digest(Path(out)))
    assert len(digests) == 1


def test_shards_are_filled_up_to_the_maximum_size(cli: Cli) -> None:
    import json

    from safetensors import safe_open

    torch.save({"a": torch.zeros(100), "b": torch.ones(100), "c": torch.zeros(300), "d": torch.arange(5)}, "in.pth")
    cli("save", "out/", "-m", "in.pth", "--max-shard-size", "800")
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00001-of-00003.safetensors",
        "c": "model-00002-of-00003.safetensors",  # larger than the maximum size, in a shard of its own
        "d": "model-00003-of-00003.safetensors",
    }
    assert index["metadata"]["total_size"] == 400 + 400 + 1200 + 40
    for name, file in index["weight_map"].items():
        with safe_open(f"out/{file}", "pt") as shard:
            assert torch.equal(shard.get_tensor(name), torch.load("in.pth")[name])
    assert "is not a size in bytes" in cli("save", "x/", "-m", "in.pth", "--max-shard-size", "big", code=2).err


# --- what runs leave behind ----------------------------------------------------------------------------------------


@posix_only
def test_only_abandoned_temporary_files_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "m[1].pth"
    abandoned = tmp_path / f".m[1].pth.deadbeef{atomic.TEMPORARY}"
    abandoned.write_bytes(b"half")
    other = tmp_path / f".m.pth.deadbeef{atomic.TEMPORARY}"
    other.write_bytes(b"of another file")
    (tmp_path / f".m[1].pth.00f01de2{atomic.TEMPORARY}").mkdir()
    (tmp_path / f".m[1].pth.0000114c{atomic.TEMPORARY}").symlink_to(other)
    with atomic.replacing(target, force=True) as (file, temporary):
        file.write(b"new")
        assert not abandoned.exists()
        with atomic.replacing(target, force=True) as (second, _):  # at the same time, by another one
            second.write(b"second")
            assert temporary.exists()
    assert target.read_bytes() == b"new"
    assert sorted(temporaries(tmp_path)) == sorted([other.name, f".m[1].pth.0000114c{atomic.TEMPORARY}"])


def test_a_temporary_file_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = iter([bytes(4), bytes([17] * 4)])
    monkeypatch.setattr(os, "urandom", lambda _n: next(names))
    (tmp_path / f".m.pth.00000000{atomic.TEMPORARY}").symlink_to(victim)
    with atomic.replacing(tmp_path / "m.pth", force=True) as (file, _):
        file.write(b"new")
    assert victim.read_text() == "precious"
    assert list(names) == []  # both were taken


# --- faults --------------------------------------------------------------------------------------------------------


class Failing:
    """A function that counts its calls and fails at the `at`-th one; by default it never fails."""

    def __init__(self, original: Callable[..., Any], number: int, at: int = 0) -> None:
        self.original, self.number, self.at, self.calls = original, number, at, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(self.number, os.strerror(self.number))
        return self.original(*args, **kwargs)


FAULTS = [(name, number) for name in ("pwrite", "fsync", "ftruncate") for number in (errno.ENOSPC, errno.EIO)]
FAULTS += [("copy_file_range", number) for number in (errno.ENOSPC, errno.EIO, errno.EXDEV)]
FAULTS += [("replace", number) for number in (errno.EIO, errno.EXDEV, errno.EACCES)]
FAULTS += [("open", errno.EACCES), ("mkdir", errno.ENOSPC), ("rename", errno.EIO), ("chmod", errno.EPERM)]
FAULTS += [("unlink", errno.EIO), ("rmdir", errno.EIO)]
#: What the command gets over: it reads and writes what cannot be copied, and what stays behind is the next run's.
TOLERATED = {
    ("copy_file_range", errno.EIO),
    ("copy_file_range", errno.EXDEV),
    ("unlink", errno.EIO),
    ("rmdir", errno.EIO),
}


def is_called(name: str, out: str, can_exchange: bool) -> bool:
    """Whether a command that replaces `out` makes this call at all."""
    if name == "replace":
        return out != "out/" and not can_exchange
    if name == "rename":
        return out == "out/" and not can_exchange
    return out == "out/" or name not in ("mkdir", "rmdir")


FAULTY_RUNS = [
    pytest.param(out, name, number, can, id=f"{out}-{name}-{errno.errorcode[number]}{'' if can else '-no-exchange'}")
    for name, number in FAULTS
    for out in ("out.pth", "out.safetensors", "out/")
    for can in (True, False)
    if is_called(name, out, can)
]


def half_a_hole(path: Path) -> None:
    """A checkpoint whose second tensor begins with data and ends with a hole, at the end of a page."""
    sparse_pth(path, [3, 102_400])
    storage = checkpoints.read(path).tensors["layers.1.weight"].storage
    assert isinstance(storage, Span)
    with path.open("r+b") as file:
        file.seek(storage.offset)
        file.write(torch.randn(40_960).numpy().tobytes())


@posix_only
@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="nothing is copied by the system")
@pytest.mark.parametrize(("out", "name", "number", "can_exchange"), FAULTY_RUNS)
def test_a_fault_at_any_system_call_leaves_the_old_file(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, out: str, name: str, number: int, can_exchange: bool
) -> None:
    """Each system call fails in turn: exit code 5, the old file, and one message with path and reason; or the new file.

    Only where the last step fails, which makes the new name durable, and the system has no way back to the old one, the
    new one is there, and the message says so.
    """
    half_a_hole(folder / "in.pth")
    edit = ["remove", "layers.0", "-m", "in.pth", "--force", "-o"]
    path, reported = Path(out), 0

    def run(at: int) -> tuple[int, int]:
        call = Failing(getattr(os, name), number, at)
        with monkeypatch.context() as patch:
            if not can_exchange:
                patch.setattr(atomic, "_exchange", lambda *_names: False)
            patch.setattr(os, name, call)
            return main([*edit, out]), call.calls

    def restore() -> None:
        cli("save", out, "-m", "in.pth", "--force")

    restore()
    before = digest(path)
    code, calls = run(0)
    after = digest(path)
    assert code == 0
    assert calls > 0
    assert after != before
    restore()
    for at in range(1, calls + 1):
        cli.capsys.readouterr()
        code, made = run(at)
        told = cli.capsys.readouterr().err
        assert made >= at, f"the {at}th call of {name} was not made"
        reported += code == 5
        late = "was written, but it may not survive a loss of power" in told
        assert not late or (name == "fsync" and not can_exchange)
        assert digest(path) == (after if late or code == 0 else before), f"the {at}th call of {name}"
        assert temporaries(folder) == [], f"the {at}th call of {name}"
        if code:
            assert code == 5
            assert re.search(rf"\b({path}|in.pth)\b", told), told
            assert told.count("error: ") == 1
        if code == 0 or late:
            restore()
    assert (reported > 0) == ((name, number) not in TOLERATED)


@posix_only
@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("name", ["unlink", "rmdir"])
def test_a_file_that_cannot_be_removed_is_removed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, can_exchange: bool
) -> None:
    path = tmp_path / "m"
    held = path / "a.safetensors" if name == "rmdir" else path

    def write(text: str) -> None:
        if name == "rmdir":
            fill(path, {held.name: text})
            return
        with atomic.replacing(path, force=True) as (file, _):
            file.write(text.encode())

    def fail(*_args: object, **_options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write("old")
    with monkeypatch.context() as patch:
        if not can_exchange:
            patch.setattr(atomic, "_exchange", lambda *_names: False)
        patch.setattr(os, name, fail)
        write("new")
    assert held.read_text() == "new"
    assert len(temporaries(tmp_path)) == (name == "rmdir" or can_exchange)
    write("newer")
    assert held.read_text() == "newer"
    assert temporaries(tmp_path) == []


@posix_only
@pytest.mark.parametrize("out", ["out.pth", "out.safetensors", "out/"])
def test_a_fault_is_one_message(cli: Cli, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    def full(*_args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        error = cli("save", out, "-m", "nets.py:Places", code=5).err
    assert error.count("\n") == 1
    assert f"error: cannot write {out.rstrip('/')}: No space left on device" in error


@posix_only
def test_a_file_that_grows_too_large(cli: Cli, folder: Path) -> None:
    """RLIMIT_FSIZE acts like a quota: the kernel refuses to write. The test uses a separate process."""
    torch.save({"w": torch.randn(1_000_000)}, "in.pth")
    Path("out.pth").write_bytes(b"old")
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        "from modelcli.cli import main; raise SystemExit(main(['save', 'out.pth', '-m', 'in.pth', '--force']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 5
    assert "cannot write out.pth: File too large" in ended.stderr
    assert Path("out.pth").read_bytes() == b"old"
    assert temporaries(folder) == []


@posix_only
def test_no_edit_of_a_file_in_its_place_harms_it_if_the_disk_is_full(folder: Path) -> None:
    """Each edit has sources of its own (converted, joined, cut, of another file), and all have one writer."""
    torture.make_input(folder, 60_000)
    (folder / "in.pth").rename(folder / "other.pth")
    torture.make_input(folder, 60_000)
    before = Path("in.pth").read_bytes()
    program = (
        "import json, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000));"
        "from modelcli.cli import main;"
        "print(*(main([*edit, '-m', 'in.pth', '-o', 'in.pth', '--force', '-q']) for edit in json.loads(sys.argv[1])))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, json.dumps(torture.EDITS)], capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.split()[-len(torture.EDITS) :] == ["5"] * len(torture.EDITS), ended.stderr
    assert ended.stderr.count("cannot write in.pth: File too large") == len(torture.EDITS)
    assert Path("in.pth").read_bytes() == before
    assert temporaries(folder) == []


# --- kills ---------------------------------------------------------------------------------------------------------


@posix_only
@pytest.mark.parametrize(
    ("out", "number"),
    [("out.pth", signal.SIGTERM), ("out.pth", signal.SIGHUP), ("out.pth", signal.SIGINT), ("out/", signal.SIGTERM)],
)
def test_a_signal_leaves_no_temporary_file(folder: Path, out: str, number: signal.Signals) -> None:
    code, told = torture.interrupted(folder, out, number)
    assert code == 128 + number
    assert ("interrupted" if number == signal.SIGINT else f"ended by {number.name}") in told
    assert temporaries(folder) == []
    assert not (folder / out).exists()


@posix_only
@pytest.mark.parametrize(
    ("kill", "times", "out"),
    [
        *((torture.kill_repeatedly, 12, out) for out in ("out.pth", "out.safetensors", "out/")),
        (torture.kill_edits, 3, "out.pth"),
    ],
)
def test_killed_at_random_moments(tmp_path: Path, kill: Callable[..., torture.Report], times: int, out: str) -> None:
    """A few times here, and hundreds of times by `make torture`: by SIGKILL, SIGTERM and SIGINT in turn."""
    report = kill(tmp_path, out, times=times, seed=int(time.time()) % 1000)
    assert report.broken == []
    assert report.left_behind == []
    assert report.old + report.new == times


def test_a_signal_whose_exception_was_lost_still_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch catches all exceptions around one of its imports, so an exception of a signal handler is lost there."""
    path = tmp_path / "m.pth"
    path.write_bytes(b"old")
    monkeypatch.setattr(atomic, "asked_to_end", [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt), atomic.replacing(path, force=True) as (file, _):
        file.write(b"new")
    with pytest.raises(KeyboardInterrupt), atomic.replacing_folder(tmp_path / "x", force=True) as folder:
        (folder / "a.safetensors").write_text("new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pth"]


def test_a_target_that_appears_meanwhile_needs_force(tmp_path: Path) -> None:
    with (
        pytest.raises(RequestError, match="appeared meanwhile"),
        atomic.replacing_folder(tmp_path / "x", force=False),
    ):
        (tmp_path / "x").mkdir()


def test_a_file_being_put_in_place_is_not_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may search for abandoned files at any time, so the file stays locked until it has its final name."""
    original = os.replace

    def replace(old: str, new: str, **folders: Any) -> None:
        atomic.remove_abandoned(tmp_path / new)
        original(old, new, **folders)

    monkeypatch.setattr(os, "replace", replace)
    with atomic.replacing(tmp_path / "m.pth", force=False) as (file, _):
        file.write(b"new")
    assert (tmp_path / "m.pth").read_bytes() == b"new"


def test_the_space_of_files_left_by_a_killed_run_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f".m.pth.00000000{atomic.TEMPORARY}"
    left.write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0 if left.exists() else 1000))
    atomic.require_space(tmp_path / "m.pth", 900)
    assert not left.exists()


@pytest.mark.parametrize("name", ["模" * 80 + ".pth", "é" * 120 + ".pth", "a" * 250 + ".pth"])
def test_names_as_long_as_the_system_takes(tmp_path: Path, name: str) -> None:
    left = tmp_path / f".{atomic._stem(name)}.00000000{atomic.TEMPORARY}"
    left.write_bytes(b"left")
    with atomic.replacing(tmp_path / name, force=False) as (file, _):
        file.write(b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_new_folders_are_removed_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic.replacing(tmp_path / "a" / "b" / "m.pth", force=False):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@posix_only
@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_new_names_that_cannot_be_made_durable_are_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool, old: str | None, can_exchange: bool
) -> None:
    path = tmp_path / "new" / "m"
    held = path / "model.safetensors" if is_folder else path
    if old is not None:
        held.parent.mkdir(parents=True)
        held.write_text(old)
    fsync = os.fsync

    def fails(handle: int) -> None:
        if os.path.samestat(os.fstat(handle), path.parent.stat()):
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    def write() -> None:
        if is_folder:
            with atomic.replacing_folder(path, force=True) as folder:
                (folder / held.name).write_text("new")
        else:
            with atomic.replacing(path, force=True) as (file, _):
                file.write(b"new")

    monkeypatch.setattr(os, "fsync", fails)
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_names: False)
    if old is None:
        with pytest.raises(SystemFailureError, match=r"cannot write .*m: Input/output error"):
            write()
        assert list(tmp_path.iterdir()) == []
    elif can_exchange:
        with pytest.raises(SystemFailureError, match=r"cannot write .*m: Input/output error"):
            write()
        assert held.read_text() == "old"
    else:
        with pytest.raises(SystemFailureError, match=r"m was written, but it may not survive a loss of power: Input"):
            write()
        assert held.read_text() == "new"
    assert temporaries(tmp_path) == []


def as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as a user to whom file modes apply; root may write everything."""

    def access(path: str | Path, mode: int) -> bool:
        return mode & os.W_OK == 0 or bool(Path(path).stat().st_mode & stat.S_IWUSR)

    monkeypatch.setattr(os, "access", access)


@pytest.mark.parametrize("words", [["save", "m.pth", "-m", "nets.py:Net", "--force"], ["freeze", "."]])
def test_a_file_that_may_not_be_written_is_refused(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Also a recipe: the folder's permission would allow a rename, but the file's mode says not to write it."""
    as_nobody(monkeypatch)
    if words[0] == "freeze":
        cli("load", "nets.py:Net")
    else:
        cli("save", "m.pth", "-m", "nets.py:Net")
    file = folder / ("modelcli.toml" if words[0] == "freeze" else "m.pth")
    before = file.read_bytes()
    file.chmod(0o444)
    assert f"cannot write {file.name}: no permission to write it" in cli(*words, code=5).err
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (before, 0o444)
    assert temporaries(folder) == []
    file.chmod(0o644)
    cli(*words)
    assert file.read_bytes() != before or words[0] == "save"


def test_a_symlink_to_a_read_only_file_is_replaced_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache replaces links themselves, so the permissions of their targets do not matter."""
    as_nobody(monkeypatch)
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "theirs").chmod(0o444)
    (tmp_path / "link").symlink_to("theirs")
    with atomic.replacing(tmp_path / "link", force=True, through_links=False) as (file, _):
        file.write(b"new")
    assert ((tmp_path / "link").read_bytes(), (tmp_path / "theirs").read_bytes()) == (b"new", b"theirs")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone can give files away")
def test_owner_and_group_stay(tmp_path: Path) -> None:
    (tmp_path / "m.pth").write_bytes(b"old")
    os.chown(tmp_path / "m.pth", 1234, 2345)
    with atomic.replacing(tmp_path / "m.pth", force=True) as (file, _):
        file.write(b"new")
    status = (tmp_path / "m.pth").stat()
    assert (status.st_uid, status.st_gid) == (1234, 2345)
    fill(tmp_path / "out", {"a": "old"})
    (tmp_path / "out").chmod(0o2750)
    fill(tmp_path / "out", {"a": "new"})
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o2750
