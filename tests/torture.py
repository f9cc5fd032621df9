"""Kill writers at random moments: afterwards the target is always the old or the new file. `make torture` runs it long.

Three kinds of process are killed: one that writes two checkpoints in turn, without torch and without waiting for the
disk, the program itself while it edits a checkpoint in place, and one of the ranks that edit one together. After
`SIGKILL` the next run has to remove temporary files; on other signals the process removes them itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelcli.files.atomic import TEMPORARY

#: A program that writes two checkpoints in turn until it is killed. It prints `x` once it has written the first.
_WRITER = """
import importlib, sys
from pathlib import Path
from modelcli import checkpoints, writing
from modelcli.writing import WriteOptions, Plan, PlannedTensor

main = importlib.import_module("modelcli.cli.main")
main._end_in_order()
out, kind = Path(sys.argv[1]), writing.format_of(sys.argv[1])
tensors = {n: PlannedTensor(e.shape, e.dtype, e.stride, 0, e.storage)
           for n, e in checkpoints.read(Path("in.pth")).tensors.items()}
plans = [Plan(tensors, "{}"), Plan({n: t for n, t in tensors.items() if n != "w0"}, "{}")]
rounds = int(sys.argv[2])
try:
    for number in range(rounds):
        if number == 1:
            print("x", flush=True)  # everything is imported by now
        options = WriteOptions(force=True, max_shard_bytes=300_000, durable=False)
        writing.write(plans[number % 2], out, options, kind=kind)
except main._EndedError as error:
    raise SystemExit(128 + error.number)
except KeyboardInterrupt:
    raise SystemExit(130)
"""

#: A program that runs modelcli slowed down where it writes, and prints when it begins to write.
_SLOW = """
import os, sys, time
from modelcli.cli import run
from modelcli.writing import output

original = output._pwrite

def slow(*args):
    os.write(1, b"writing\\n")  # past whatever standard output is redirected to
    time.sleep(0.2)
    return original(*args)

output._pwrite = slow
sys.argv = ["modelcli", "save", sys.argv[1], "-m", "in.pth"]
run()
"""


#: modelcli itself; the words of a command line follow.
_PROGRAM = "import sys; from modelcli.cli import run; sys.argv[0] = 'modelcli'; run()"

#: The signals that are sent in turn.
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Report:
    """How often the target was the old and the new file, what else it was, and which temporary files remained."""

    old: int = 0
    new: int = 0
    broken: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)

    def see(self, kill: str, found: str, old_and_new: list[str]) -> None:
        """Count what the target is after a kill."""
        self.old += found == old_and_new[0]
        self.new += found == old_and_new[1]
        if found not in old_and_new:
            self.broken.append(f"{kill}: the target is neither")

    def look_for_temporaries(self, kill: str, folder: Path) -> None:
        if left := [entry.name for entry in folder.glob(f".*{TEMPORARY}")]:
            self.left_behind.append(f"{kill}: {left}")


def digest(path: Path) -> str:
    """Return a digest of a file, or of the names and bytes of a folder's files; empty if there is neither."""
    if not path.exists():
        return "nothing"
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def make_input(folder: Path, elements: int = 60_000) -> None:
    import torch

    state = {f"w{number}": torch.randn(elements // 100, 100) for number in range(8)}
    state |= {"fp8.weight": torch.randn(256, 256).to(torch.float8_e4m3fn), "fp8.weight_scale_inv": torch.rand(2, 2)}
    torch.save(state, folder / "in.pth")


def _start(folder: Path, program: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=None if os.name == "nt" else _heed_signals,
    )


def _heed_signals() -> None:
    """Restore the default signal handlers, because background jobs inherit that some signals are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _finish(process: subprocess.Popen[bytes]) -> None:
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told.decode()


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> str | None:
    """Send a signal until the process ends. Returns what was wrong with its end, or None."""
    for _ in range(5):
        process.send_signal(number)
        # Python drops an exception that a handler raises while a generator is closed, so send the signal again.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            break
    else:
        process.kill()
        process.communicate()
        return "it did not end"
    _, told = process.communicate()
    allowed = (0, 128 + number, -number)
    return None if process.returncode in allowed else f"exit {process.returncode}: {told.decode()}"


def kill_repeatedly(folder: Path, out: str, *, times: int, seed: int) -> Report:
    """Kill a writer `times` times at random moments, by each of the signals in turn."""
    make_input(folder)
    digests = []
    for rounds in ("1", "2"):  # the digest of each of the two without a kill
        _finish(_start(folder, _WRITER, out, rounds))
        digests.append(digest(folder / out))
    report, moments = Report(), random.Random(seed)
    for turn in range(times):
        number = SIGNALS[turn % 3]
        process = _start(folder, _WRITER, out, "1000000")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        kill = f"kill {turn} of a writer by {number.name}"
        if wrong := _end(process, number):
            report.broken.append(f"{kill}: {wrong}")
        report.see(kill, digest(folder / out), digests)
        if number == signal.SIGKILL:
            _finish(_start(folder, _WRITER, out, "1"))
        report.look_for_temporaries(kill, folder)
    return report


#: The edits that are killed in turn: of values as they are, converted, put together, cut apart, and of another file.
EDITS = (
    ("cast", "w0", "half"),
    ("split", "w0", "a", "b"),
    ("concat", "w0", "w1", "both"),
    ("permute", "w?", "1,0"),
    ("stack", "w[0-3]", "all"),
    ("unstack", "w0", "rows.*"),
    ("reshape", "w0", "-1,10"),
    ("rename", "w*", "v.*"),
    ("graft", ".", "other.pth"),
    ("remove", "w7"),
    ("tie", "w0", "w1"),
    ("init", "w0", "zeros"),
    ("dequantize", ".", "half"),
)


def kill_edits(folder: Path, out: str, *, times: int, seed: int) -> Report:
    """Kill the program in an edit of a checkpoint in its place, up to 50 ms after it has begun to write.

    Each turn is the next of `EDITS`.
    """
    make_input(folder, 300_000)  # large enough that it takes about as long to write
    (folder / "in.pth").rename(folder / "other.pth")
    make_input(folder, 300_000)
    _finish(_start(folder, _PROGRAM, "save", out, "-m", "in.pth"))
    target, kept = folder / out, folder / "kept"
    _copy(target, kept)
    old, new = digest(target), dict[int, Any]()
    report, moments = Report(), random.Random(seed)
    for turn in range(times):
        number, chosen = SIGNALS[turn % 3], turn % len(EDITS)
        edit = (_PROGRAM, *EDITS[chosen], "-m", f"./{out}", "-o", out, "--force")
        if chosen not in new:
            _copy(kept, target)
            _finish(_start(folder, *edit))
            new[chosen] = digest(target)
            assert new[chosen] != old, edit
        _copy(kept, target)
        process = _start(folder, *edit)
        while process.poll() is None and not list(folder.glob(f".*{TEMPORARY}")):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        kill = f"kill {turn} of {EDITS[chosen][0]} by {number.name}"
        if wrong := _end(process, number):
            report.broken.append(f"{kill}: {wrong}")
        report.see(kill, digest(target), [old, new[chosen]])
        if number == signal.SIGKILL:
            _copy(kept, target)
            _finish(_start(folder, *edit))
        report.look_for_temporaries(kill, folder)
    return report


#: How to start modelcli on several ranks: the words before its own, those behind them, and the name of each rank in
#: `tests/ranks/faults`.
LAUNCHES = {
    "--jobs": ((sys.executable, "-m", "modelcli"), ("--jobs", "3"), ("", "1", "2")),
    "torchrun": (
        (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "modelcli"),
        (),
        ("0", "1"),
    ),
}


def kill_ranks(folder: Path, launch: str, *, times: int, seed: int) -> Report:
    """Kill one of several ranks with SIGKILL, from when they begin to write to just after they have finished.

    The launch has to end, in failure unless the new folder is there. No temporary folder may remain.
    """
    make_input(folder)
    before, after, ranks = LAUNCHES[launch]
    target, kept = folder / "out", folder / "kept"
    _finish(_start(folder, _PROGRAM, "save", "out/", "-m", "in.pth"))
    _copy(target, kept)
    digests = [digest(target)]
    edit = ("cast", "w*", "half", "-m", "in.pth", "-o", "out/", "--force", "--max-shard-size", "200KB")
    _finish(_start(folder, _PROGRAM, *edit))
    digests.append(digest(target))
    faults = str(Path(__file__).parent / "ranks" / "faults")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([faults, *sys.path]),
        "RANK_FAULTS": json.dumps({rank: {"slow": 0.03} for rank in ranks}),
        "OMP_NUM_THREADS": "1",
        "MODELCLI_RANK_TIMEOUT": "60",
    }
    report, moments = Report(), random.Random(seed)
    for turn in range(times):
        _copy(kept, target)
        for told in folder.glob("rank-*.writes"):
            told.unlink()
        process = subprocess.Popen(
            [*before, *edit, *after], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while process.poll() is None and len(list(folder.glob("rank-*.writes"))) < len(ranks):
            time.sleep(0.001)
        rank = moments.choice(ranks)
        time.sleep(moments.uniform(0, 0.6))
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int((folder / f"rank-{rank}.writes").read_text()), signal.SIGKILL)
        kill = f"kill {turn} of rank {rank or 0} of {launch}"
        try:
            _, told_errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            _, told_errors = process.communicate()
            report.broken.append(f"{kill}: it did not end")
        found = digest(target)
        report.see(kill, found, digests)
        errors = sum(line.startswith(b"error: ") for line in told_errors.splitlines())
        if found == digests[0] and (process.returncode == 0 or errors != 1):
            report.broken.append(f"{kill}: exit {process.returncode}, {errors} messages: {told_errors.decode()[:300]}")
        report.look_for_temporaries(kill, folder)
    return report


def _copy(old: Path, new: Path) -> None:
    """Replace a file or folder by a copy of another."""
    if old.is_dir():
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new)
    else:
        shutil.copy(old, new)


def interrupted(folder: Path, out: str, number: signal.Signals) -> tuple[int, str]:
    """Send a signal to a command while it writes. Returns its exit code and its standard error."""
    make_input(folder)
    process = _start(folder, _SLOW, out)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    return process.returncode, told.decode()


def main() -> int:
    """`make torture`: of each kind of output TIMES kills of a writer, and a tenth as many of the program's edits.

    A third of them is by each signal: 600 are 200 by each. Of ranks, a sixth as many are killed, all with SIGKILL.
    """
    times, seed = int(os.environ.get("TIMES", "600")), int(os.environ.get("SEED", "0"))
    wrong = 0
    for out in ("out.pth", "out.safetensors", "out/"):
        for what, kill, number in (("a writer", kill_repeatedly, times), ("edits", kill_edits, max(3, times // 10))):
            wrong += _count_wrong(kill, out, what, number, seed)
    for launch in LAUNCHES:
        wrong += _count_wrong(kill_ranks, launch, "ranks", max(3, times // 6), seed)
    return 1 if wrong else 0


def _count_wrong(kill: Callable[..., Report], out: str, what: str, number: int, seed: int) -> int:
    """Kill processes, print what came of it, and return how often something was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        report = kill(Path(folder), out, times=number, seed=seed)
    print(
        f"{out:16} {number} kills of {what} in {time.perf_counter() - start:.0f} s: {report.old} old, "
        f"{report.new} new, {len(report.broken)} broken, {len(report.left_behind)} left temporaries behind",
        flush=True,
    )
    for line in (*report.broken, *report.left_behind):
        print(f"    {line}")
    return len(report.broken) + len(report.left_behind)


if __name__ == "__main__":
    sys.exit(main())
