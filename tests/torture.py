"""Writers killed at random moments: the target is the old one or the new one, every time. `make torture` runs it long.

What is written again and again by a process of its own are two checkpoints, in turn, without torch; what is killed is
that process. `SIGKILL` leaves it no chance, and the next run has to clean up; the others it unwinds from.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from modelcli.atomic import TEMPORARY

#: Writes two checkpoints in turn until it is killed; `x` on standard output says that it has written the first.
_WRITER = """
import importlib, sys
from pathlib import Path
from modelcli import checkpoints, writing
from modelcli.writing import Care, Plan, PlannedTensor

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
        writing.write(plans[number % 2], out, Care(force=True, max_shard_bytes=300_000, durable=False), kind=kind)
except main._EndedError as error:
    raise SystemExit(128 + error.number)
except KeyboardInterrupt:
    raise SystemExit(130)
"""

#: A command of the real program that is slowed down where it writes, and says when it is there.
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


@dataclass
class Report:
    """How often the target was the old one and the new one, what was neither, and what stayed behind.

    `for_the_next` counts the signals that came in the few instructions between a file and the note of it: the next run
    removes what they leave, as it does after `SIGKILL`.
    """

    old: int = 0
    new: int = 0
    for_the_next: int = 0
    broken: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)


def digest(path: Path) -> str:
    """The bytes of a file, or of every file of a folder with their names; of nothing, nothing."""
    if not path.exists():
        return "nothing"
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def make_input(folder: Path) -> None:
    import torch

    torch.save({f"w{number}": torch.randn(60_000) for number in range(8)}, folder / "in.pth")


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
    """A job in the background inherits that some are ignored; at a terminal they are not."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _finish(process: subprocess.Popen[bytes]) -> None:
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told.decode()


def kill_repeatedly(folder: Path, out: str, *, times: int, seed: int) -> Report:
    """Kill a writer so many times, at moments drawn at random, by signals in turn."""
    make_input(folder)
    digests = []
    for rounds in ("1", "2"):  # what each of the two comes to when nobody kills it
        _finish(_start(folder, _WRITER, out, rounds))
        digests.append(digest(folder / out))
    report, moments = Report(), random.Random(seed)
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    for number in range(times):
        process = _start(folder, _WRITER, out, "1000000")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        for _ in range(5):
            process.send_signal(signals[number % 3])
            # Python loses what a handler raises while a generator is being closed: as a person would, ask again.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
                break
        else:
            process.kill()
            report.broken.append(f"kill {number} by {signals[number % 3].name}: it did not end")
        process.communicate()
        found = digest(folder / out)
        report.old += found == digests[0]
        report.new += found == digests[1]
        if found not in digests:
            report.broken.append(f"kill {number} by {signals[number % 3].name}: {out} is neither")
        if left := _temporaries(folder):
            report.for_the_next += number % 3 > 0
            _finish(_start(folder, _WRITER, out, "1"))
            if left := _temporaries(folder):
                report.left_behind.append(f"kill {number} by {signals[number % 3].name}: {left}")
    return report


def interrupted(folder: Path, out: str, number: signal.Signals) -> tuple[int, str]:
    """Send a signal to a command in the middle of its writing: its exit code, and what it said."""
    make_input(folder)
    process = _start(folder, _SLOW, out)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    return process.returncode, told.decode()


def _temporaries(folder: Path) -> list[str]:
    return [entry.name for entry in folder.glob(f".*{TEMPORARY}")]


def main() -> int:
    """`make torture`: TIMES kills of a file and of a folder, in each of the three ways."""
    times, seed = int(os.environ.get("TIMES", "600")), int(os.environ.get("SEED", "0"))
    wrong = 0
    for out in ("out.pth", "out.safetensors", "out/"):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            report = kill_repeatedly(Path(folder), out, times=times, seed=seed)
            print(
                f"{out:16} {times} kills in {time.perf_counter() - start:.0f} s: {report.old} old, {report.new} new, "
                f"{len(report.broken)} broken, {len(report.left_behind)} left behind by the next run "
                f"({report.for_the_next} left for it by a signal that unwinds)",
                flush=True,
            )
            for line in (*report.broken, *report.left_behind):
                print(f"    {line}")
            wrong += len(report.broken) + len(report.left_behind)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
