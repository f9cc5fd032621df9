"""What fails in one rank ends all of them, with one message that names it, and the old folder stays."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from modelcli.files.atomic import TEMPORARY
from tests.conftest import Cli, Result

FAULTS = Path(__file__).parent / "faults"
_WORDS = ("cast", "**", "bfloat16", "-m", "in.pth", "-o", "out/", "--force", "--max-shard-size", "25KB", "--jobs", 3)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


@pytest.fixture
def old(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """in.pth, and out/ with another checkpoint; its files and their digests."""
    torch.save({f"w{number}": torch.randn(100, 100) for number in range(9)}, folder / "in.pth")
    cli("save", "out/", "-m", "in.pth")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")]))
    return _digests(folder)


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / "out").iterdir()}


def _fail(
    cli: Cli, folder: Path, old: dict[str, str], monkeypatch: pytest.MonkeyPatch, code: int = 5, **fault: object
) -> Result:
    """Run the edit with a fault in rank 1; it has to leave the old folder alone, and nothing else."""
    monkeypatch.setenv("RANK_FAULTS", json.dumps({"1": fault}))
    found = cli(*_WORDS, code=code)
    assert found.err.count("error: ") == 1
    assert _digests(folder) == old
    assert not list(folder.glob(f".*{TEMPORARY}"))
    return found


def _signal_rank(folder: Path, number: signal.Signals) -> threading.Thread:
    """Send a signal to rank 1 as soon as it writes."""

    def send() -> None:
        told = folder / "rank-1.writes"
        deadline = time.monotonic() + 60
        while not told.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(int(told.read_text()), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_full_disk(cli: Cli, folder: Path, old: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    found = _fail(cli, folder, old, monkeypatch, most=10_000)
    assert f"error: rank 1 on {os.uname().nodename}: cannot write out: File too large" in found.err


def test_a_rank_that_is_killed(cli: Cli, folder: Path, old: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    sent = _signal_rank(folder, signal.SIGKILL)
    found = _fail(cli, folder, old, monkeypatch, slow=1)
    sent.join()
    assert f"error: rank 1 on {os.uname().nodename} died: SIGKILL" in found.err


def test_a_rank_that_is_asked_to_end(cli: Cli, folder: Path, old: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    sent = _signal_rank(folder, signal.SIGTERM)
    found = _fail(cli, folder, old, monkeypatch, 128 + signal.SIGTERM, slow=1)
    sent.join()
    assert f"error: rank 1 on {os.uname().nodename}: ended by SIGTERM" in found.err


def test_a_rank_that_hangs(cli: Cli, folder: Path, old: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MODELCLI_RANK_TIMEOUT", "2")
    sent = _signal_rank(folder, signal.SIGSTOP)
    found = _fail(cli, folder, old, monkeypatch, slow=0.2)
    sent.join()
    assert f"error: rank 1 on {os.uname().nodename} made no progress for 2 s" in found.err
    with pytest.raises(ProcessLookupError):  # the process that hung is gone as well
        os.kill(int((folder / "rank-1.writes").read_text()), 0)


def test_a_rank_that_works_in_vain(cli: Cli, folder: Path, old: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """It answers, but does not get on: as where a file system does not."""
    monkeypatch.setenv("MODELCLI_RANK_TIMEOUT", "2")
    found = _fail(cli, folder, old, monkeypatch, slow=60)
    assert f"error: rank 1 on {os.uname().nodename} made no progress for 2 s" in found.err


def test_a_rank_with_another_plan(cli: Cli, folder: Path, old: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    found = _fail(cli, folder, old, monkeypatch, other_plan=True)
    assert f"error: rank 1 on {os.uname().nodename} has another plan than rank 0" in found.err


def test_a_source_that_changes(cli: Cli, folder: Path, old: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    program = "import os; os.utime('in.pth')"
    found = _fail(cli, folder, old, monkeypatch, 4, run=program)
    assert "in.pth changed while it was being read" in found.err


def test_a_worker_that_does_not_start(cli: Cli, folder: Path, old: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    broken = folder / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    found = cli(*_WORDS, code=5)
    assert "error: worker 1 ended before it began: exit code 7" in found.err
    assert _digests(folder) == old


def test_rank_0_is_killed(cli: Cli, folder: Path, old: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """Rank 1 then says so, and removes what was written."""
    killing = json.dumps({"": {"run": "import os, time; time.sleep(0.3); os.kill(os.getpid(), 9)"}, "1": {"slow": 0.5}})
    words = [sys.executable, "-m", "modelcli", *map(str, _WORDS)]
    killed = subprocess.run(
        words, env={**os.environ, "RANK_FAULTS": killing}, capture_output=True, text=True, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    assert killed.stderr == f"error: rank 0 on {os.uname().nodename} is gone\n"
    assert _digests(folder) == old
    assert not list(folder.glob(f".*{TEMPORARY}"))


def test_ctrl_c_ends_the_workers(cli: Cli, folder: Path, old: dict[str, str]):
    faults = json.dumps({"1": {"slow": 30}, "2": {"slow": 30}})
    words = [sys.executable, "-m", "modelcli", *map(str, _WORDS)]
    process = subprocess.Popen(
        words,
        env={**os.environ, "RANK_FAULTS": faults},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    while process.poll() is None and len(list(folder.glob("rank-*.writes"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert _digests(folder) == old
    assert not list(folder.glob(f".*{TEMPORARY}"))
    for told in folder.glob("rank-*.writes"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(told.read_text()), 0)
