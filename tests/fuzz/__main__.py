"""Random inputs for every parser: each must give a result or one of modelcli's errors.

    make fuzz                      a million inputs for each parser, fewer where each takes long
    make fuzz INPUTS=1000 SEED=7   fewer, and others
    make fuzz TARGETS=edits,pickle these parsers alone; agreement: the readers beside torch's and safetensors'

What breaks a parser is printed as bytes, with the parser's name; the seed and the number make it again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.fuzz import agreement, languages, reading
from tests.fuzz.running import run
from tests.fuzz.target import Target

INPUTS = int(os.environ.get("INPUTS", "1000000"))
#: A folder in memory, if the system has one.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
SEED = int(os.environ.get("SEED", "0"))
TARGETS = [name for name in os.environ.get("TARGETS", "").split(",") if name]


def every(folder: Path) -> list[Target]:
    """Return the parsers of files and of languages."""
    return [*reading.every(folder), *languages.every(folder)]


def fuzz(name: str) -> tuple[int, float, list[str]]:
    """Run one parser in a process of its own. Returns the number of inputs, the seconds, and the faults."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        target = next(target for target in every(Path(folder)) if target.name == name)
        faults = run(target, INPUTS, SEED)
    return INPUTS // target.one_in, time.perf_counter() - start, faults


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        names = [target.name for target in every(Path(folder)) if target.name in TARGETS or not TARGETS]
    broken = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for name, (inputs, seconds, faults) in zip(names, pool.map(fuzz, names), strict=True):
            print(f"{name:24} {inputs:>10,} inputs {seconds:8.0f} s   {len(faults)} faults", flush=True)
            for fault in faults[:5]:
                print(f"    {fault}", flush=True)
            broken += len(faults)
    if sys.platform == "linux" and (not TARGETS or "agreement" in TARGETS):
        broken += agreement.main(INPUTS, SEED)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
