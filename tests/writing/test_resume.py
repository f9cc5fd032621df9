"""`--resume`: an interrupted conversion continues, and its result has the bytes of one that was not interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modelcli import writing
from modelcli.writing import journal
from modelcli.writing.journal import Journal
from tests.conftest import Cli

KINDS = ("safetensors", "dcp")
#: The command, run slowly enough to be killed anywhere: between the pieces of a shard, and around its entry.
SLOWLY = """
import sys, time
from modelcli.writing import journal, output
from modelcli.cli.main import main
for owner, name in ((journal.Journal, "add"), (journal.Journal, "_write"), (output.Output, "_write_now")):
    def slow(*given, original=getattr(owner, name)):
        time.sleep(0.004)
        original(*given)
        time.sleep(0.004)
    setattr(owner, name, slow)
sys.exit(main(sys.argv[1:]))
"""


def source(folder: Path, count: int = 6) -> None:
    """A file of float32 tensors, each of which makes a shard."""
    generator = torch.Generator().manual_seed(0)
    state = {f"w{number}": torch.randn(40, 50, generator=generator) for number in range(count)}
    save_file(state, folder / "in.safetensors")


def words(kind: str, *more: str, out: str = "out/", dtype: str = "bfloat16") -> tuple[str, ...]:
    options = ("--max-shard-size", "3kB", "--format-out", kind)
    return ("cast", ".", dtype, "-m", "in.safetensors", "-o", out, *options, *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.modelcli-tmp"))


def interrupted(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException, *line: str, code: int = 130
) -> Any:
    """Run a command in which `error` is raised when it enters its shard number `at`."""
    original, count = Journal.add, 0

    def add(self: Journal, name: str, file: Any, *more: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise error
        original(self, name, file, *more)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", add)
        return cli(*line, code=code)


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_keeps_complete_shards_and_another_run_takes_them(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source(folder)
    cli(*words(kind, out="whole/"))
    told = interrupted(cli, monkeypatch, 4, KeyboardInterrupt(), *words(kind, "--resume")).err
    files = len(contents(folder / "whole"))
    assert f"interrupted: 3 of {files} files are kept: the same command with --resume continues" in told
    assert not (folder / "out").exists()
    (residue,) = left(folder)
    assert residue.stat().st_mode & 0o777 == 0o700
    written: list[str] = []
    original = Journal.add

    def add(self: Journal, name: str, file: Any, *more: Any) -> None:
        written.append(name)
        original(self, name, file, *more)

    monkeypatch.setattr(Journal, "add", add)
    told = cli(*words(kind, "--resume", "--verify")).err
    assert f"3 of {files} files are from the interrupted run" in told
    assert len(written) == files - 3
    assert contents(folder / "out") == contents(folder / "whole")
    assert not left(folder)


def test_several_processes_go_on_with_it(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes over its share, whoever wrote it; the values that became Inf are told as by one process."""
    state = {f"w{number}": torch.full((40, 50), 1e6 if number < 2 else 1.0) for number in range(6)}
    save_file(state, folder / "in.safetensors")
    line = words("safetensors", "--resume", dtype="half")
    interrupted(cli, monkeypatch, 5, KeyboardInterrupt(), *line)
    told = cli(*line, "--jobs", "2").err
    assert "4 of 7 files are from the interrupted run" in told
    assert "4,000 values became Inf in w0 and 1 more tensor" in told
    cli(*words("safetensors", dtype="half", out="whole/"))
    assert contents(folder / "out") == contents(folder / "whole")
    assert not left(folder)


def test_without_the_option_ctrl_c_leaves_nothing(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(folder)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_require_size", interrupt)
    cli(*words("safetensors"), code=130)
    assert not left(folder)


def test_a_full_disk(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user can mend keeps the shards, too; a source that changes meanwhile does not."""
    source(folder)
    full = OSError(28, "No space left on device")
    told = interrupted(cli, monkeypatch, 3, full, *words("safetensors", "--resume"), code=5).err
    assert "cannot write out: No space left on device" in told
    assert "2 of 7 files are kept: the same command with --resume continues" in told
    assert len(left(folder)) == 1
    cli(*words("safetensors", "--resume"))
    cli(*words("safetensors", out="whole/"))
    assert contents(folder / "out") == contents(folder / "whole")


def test_what_an_interrupted_run_has_seen_is_told(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that became Inf are counted where they were met in a shard that is taken over."""
    state = {f"w{number}": torch.full((40, 50), 1e6 if number == 1 else 1.0) for number in range(4)}
    save_file(state, folder / "in.safetensors")
    line = words("safetensors", "--resume", dtype="half")
    interrupted(cli, monkeypatch, 4, KeyboardInterrupt(), *line)
    told = cli(*line).err
    assert "3 of 5 files are from the interrupted run" in told
    assert "2,000 values became Inf in w1" in told


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _swap(path: Path) -> None:
    other = path.with_name("model-00001-of-00006.safetensors")
    path.write_bytes(other.read_bytes())


def _forget(path: Path) -> None:
    (path.parent / journal.NAME / journal._entry_of(path.name)).unlink()


def _half_entry(path: Path) -> None:
    entry = path.parent / journal.NAME / journal._entry_of(path.name)
    entry.write_bytes(entry.read_bytes()[:40])


def _link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


HARM: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "altered": _alter,
    "another": _swap,
    "no entry": _forget,
    "half an entry": _half_entry,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("harm", HARM)
def test_a_shard_that_is_not_as_its_entry_says_is_made_again(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    source(folder)
    cli(*words("safetensors", out="whole/"))
    interrupted(cli, monkeypatch, 5, KeyboardInterrupt(), *words("safetensors", "--resume"))
    (residue,) = left(folder)
    HARM[harm](residue / "model-00002-of-00006.safetensors")
    (residue / "model-00009-of-00009.safetensors").write_bytes(b"left of something else")
    (residue / "more").mkdir()
    assert "3 of 7 files are from the interrupted run" in cli(*words("safetensors", "--resume")).err
    assert contents(folder / "out") == contents(folder / "whole")


def _edit(folder: Path) -> tuple[str, ...]:
    return words("safetensors", "--resume", dtype="half")


def _source(folder: Path) -> tuple[str, ...]:
    data = bytearray((folder / "in.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "in.safetensors").write_bytes(data)
    return words("safetensors", "--resume")


def _same_source_again(folder: Path) -> tuple[str, ...]:
    os.utime(folder / "in.safetensors", (1, 1))
    return words("safetensors", "--resume")


def _size(folder: Path) -> tuple[str, ...]:
    return (*words("safetensors", "--resume"), "--max-shard-size", "9kB")


def _kind(folder: Path) -> tuple[str, ...]:
    return words("dcp", "--resume")


@pytest.mark.parametrize("other", [_edit, _source, _same_source_again, _size, _kind])
def test_other_work_starts_anew(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, other: Callable[[Path], tuple[str, ...]]
) -> None:
    source(folder)
    interrupted(cli, monkeypatch, 5, KeyboardInterrupt(), *words("safetensors", "--resume"))
    line = other(folder)
    told = " ".join(cli(*line).err.split())
    assert "everything was written anew: what an interrupted run left beside out was made without --resume, or" in told
    assert "from the interrupted run" not in told
    plain = [word if word != "out/" else "whole/" for word in line if word != "--resume"]
    cli(*plain)
    assert contents(folder / "out") == contents(folder / "whole")
    assert not left(folder)


def test_an_ordinary_run_removes_what_is_left(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(folder)
    interrupted(cli, monkeypatch, 5, KeyboardInterrupt(), *words("safetensors", "--resume"))
    cli(*words("safetensors"))
    assert not left(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such modes")
def test_a_folder_that_others_may_write_in_is_not_taken(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody could have put shards and entries there."""
    source(folder)
    interrupted(cli, monkeypatch, 5, KeyboardInterrupt(), *words("safetensors", "--resume"))
    left(folder)[0].chmod(0o777)
    assert "from the interrupted run" not in cli(*words("safetensors", "--resume")).err


def test_a_link_in_the_place_of_a_shard_is_not_followed(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(folder)
    cli(*words("safetensors", out="whole/"))
    interrupted(cli, monkeypatch, 5, KeyboardInterrupt(), *words("safetensors", "--resume"))
    _link(left(folder)[0] / "model-00002-of-00006.safetensors")
    cli(*words("safetensors", "--resume"))
    assert not any(path.is_symlink() for path in (folder / "out").iterdir())
    assert contents(folder / "out") == contents(folder / "whole")


def test_random_values_are_drawn_again(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard with values that come from no file is written anew."""
    line = ("save", "out/", "-m", "nets.py:Places", "--max-shard-size", "100B", "--resume")
    interrupted(cli, monkeypatch, 2, KeyboardInterrupt(), *line)
    told = cli(*line).err
    assert "from the interrupted run" not in told
    cli(*("whole/" if word == "out/" else word for word in line[:-1]))
    assert contents(folder / "out") == contents(folder / "whole")


def test_it_is_for_folders(cli: Cli, folder: Path) -> None:
    source(folder)
    line = ("cast", ".", "half", "-m", "in.safetensors", "-o", "out.safetensors", "--resume")
    told = cli(*line, code=2).err
    assert "--resume is for folders, and out.safetensors is one file" in told
    assert "-o out/" in told
    assert "-o out/ writes it" in cli("cast", ".", "half", "-m", "in.safetensors", "--resume", code=2).err


def test_an_existing_folder_is_replaced_with_what_is_kept_of_it(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(folder)
    cli(*words("safetensors", dtype="half"))
    (folder / "out" / "notes.txt").write_text("mine")
    interrupted(cli, monkeypatch, 5, KeyboardInterrupt(), *words("safetensors", "--resume", "--force"))
    assert "from the interrupted run" in cli(*words("safetensors", "--resume", "--force")).err
    cli(*words("safetensors", out="whole/"))
    assert contents(folder / "out") == {**contents(folder / "whole"), "notes.txt": b"mine"}


def _killed(folder: Path, kind: str, entries: int, seconds: float) -> bool:
    """Run the command in a process and kill it some time after it has entered a number of files.

    Returns whether it was killed before its end.
    """
    line = [sys.executable, "-c", SLOWLY, *words(kind, "--resume")]
    process = subprocess.Popen(line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and max(map(journal.complete_in, left(folder)), default=0) < entries:
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return process.returncode == -signal.SIGKILL


TURNS = [pytest.param(kind, turn, marks=() if turn == 0 else pytest.mark.sweep) for kind in KINDS for turn in range(12)]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(("kind", "turn"), TURNS)
def test_killed_at_any_moment_and_again(cli: Cli, folder: Path, kind: str, turn: int) -> None:
    """After `kill -9`, once or twice, the result is the same, and nothing is left."""
    source(folder, 12)
    cli(*words(kind, out="whole/"))
    chance = random.Random(f"{kind} {turn}")
    entered = 0
    for _ in range(1 + turn % 2):
        entered = chance.randint(entered, 6)
        if _killed(folder, kind, entered, chance.uniform(0, 0.05)):
            assert not (folder / "out").exists()
            assert len(left(folder)) <= 1
    if not (folder / "out").exists():
        told = cli(*words(kind, "--resume")).err
        assert not entered or "from the interrupted run" in told
    assert contents(folder / "out") == contents(folder / "whole")
    assert not left(folder)
    assert json.loads(cli("hash", "out/", "--json").out)["hash"] == cli("hash", "whole/", "--json").json["hash"]


def test_the_checksums_of_shards_are_reported(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that reads a large shard for its checksum gets on, and must not count as hung."""
    source(folder)
    monkeypatch.setattr(journal, "CHUNK", 1000)
    told: list[tuple[int, int]] = []
    original = writing._report_of

    def report_of(options: Any) -> Any:
        report = original(options)

        def noted(done: int, total: int, doing: str) -> None:
            if doing == "checking":
                told.append((done, total))
            if report is not None:
                report(done, total, doing)

        return noted

    monkeypatch.setattr(writing, "_report_of", report_of)
    interrupted(cli, monkeypatch, 4, KeyboardInterrupt(), *words("safetensors", "--resume"))
    added = len(told)
    assert added >= 3 * 4  # shards of 4 kB, in pieces of 1000 bytes
    cli(*words("safetensors", "--resume"))
    assert len(told) - added >= 7 * 4  # of which three were there
    assert told == sorted(told[:added]) + sorted(told[added:])
    assert all(done <= total for done, total in told)
