"""One process and several local ones on the processors at hand: whole commands, interleaved.

    make bench

For each number of processes: the seconds that a command took, and the seconds that all processors worked for it. Where
the second is near the first times the number of processors, the processors are what limits the command; where it is
lower, the command waits for the disk, or does one thing after another.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.bench_reading import MODELCLI, PYTHON

ROUNDS = int(os.environ.get("ROUNDS", "3"))
NBYTES = int(os.environ.get("NBYTES", str(10**9)))
JOBS = (1, 2, 4)

MAKE = """
import sys, torch
torch.save({f"layers.{n}.weight": torch.randn(2048, 2048) for n in range(int(sys.argv[1]) // 2**24)}, "in.pth")
"""

COMMANDS = {
    "cast to bfloat16, a folder of shards": ("cast", "**", "bfloat16", "-m", "in.pth", "-o", "out/", "--force"),
    "the same without fsync": ("cast", "**", "bfloat16", "-m", "in.pth", "-o", "out/", "--force", "--no-fsync"),
    "rename, a folder: bytes are copied": ("rename", "layers.**", "net.**", "-m", "in.pth", "-o", "out/", "--force"),
    "the same with --verify": ("rename", "layers.**", "net.**", "-m", "in.pth", "-o", "out/", "--force", "--verify"),
    "as a folder of dcp": (
        *("rename", "layers.**", "net.**", "-m", "in.pth", "-o", "dcp/", "--force"),
        *("--format-out", "dcp"),
    ),
    "hash": ("hash", "in.pth"),
    "params --stats": ("params", "in.pth", "--stats"),
    "check --finite": ("check", "in.pth", "--finite"),
    "diff with another file": ("diff", "in.pth", "same.pth"),
}


def measure(command: Sequence[str]) -> tuple[float, float]:
    """Seconds of one run, and the seconds that all processors worked for it."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {status}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def main() -> None:
    processors = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        subprocess.run([PYTHON, "-c", MAKE, str(NBYTES)], check=True)
        Path("same.pth").write_bytes(Path("in.pth").read_bytes())
        print(f"{NBYTES / 1e9:.1f} GB of float32, {processors} processors, medians of {ROUNDS}")
        print(f"{'':40}" + "".join(f"{f'--jobs {jobs}':>12} {'work':>8}" for jobs in JOBS) + f"{'4 / 1':>8}{'work':>6}")
        for title, words in COMMANDS.items():
            more = () if words[0] in ("hash", "params", "check", "diff") else ("--max-shard-size", f"{NBYTES // 16}B")
            runs: dict[int, list[tuple[float, float]]] = {jobs: [] for jobs in JOBS}
            for _ in range(ROUNDS):
                for jobs in JOBS:
                    os.sync()
                    runs[jobs].append(measure([*MODELCLI, *words, *more, "--jobs", str(jobs), "-q"]))
            seconds = {jobs: statistics.median(run[0] for run in runs[jobs]) for jobs in JOBS}
            work = {jobs: statistics.median(run[1] for run in runs[jobs]) for jobs in JOBS}
            columns = "".join(f"{seconds[jobs]:10.2f} s {work[jobs]:6.2f} s" for jobs in JOBS)
            print(f"{title:40}{columns}{seconds[4] / seconds[1]:8.2f}{work[4] / work[1]:6.2f}", flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
