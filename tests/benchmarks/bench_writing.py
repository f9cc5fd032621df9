"""How long an edit of a large checkpoint takes, as ratios to `cp` and to a plain script: whole processes, interleaved.

    make bench

Each round runs every command once, the disk settled in between, so that none pays for what another left to be written.
From modelcli's time and from the script's the median of `python -c "import torch"` is taken off: what is compared is
the work, with its fsync, against `cp` and `sync` of the same file. Each bound is printed with whether it is met; where
one is missed, the exit code is 1.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.bench_reading import MODELCLI, PYTHON, sparse_safetensors

from modelcli.checkpoints.storage import FileId
from modelcli.checkpoints.torch_pickle import writing as torch_zip
from modelcli.checkpoints.zip_archives import layout as zip_layout
from modelcli.writing import Plan, PlannedTensor

ROUNDS = int(os.environ.get("ROUNDS", "5"))
NBYTES = int(os.environ.get("NBYTES", str(2 * 10**9)))

MAKE = """
import sys, torch
from safetensors.torch import save_file
state = {f"layers.{n}.weight": torch.randn(5120, 2560) for n in range(int(sys.argv[1]) // (5120 * 2560 * 4))}
state |= {"head.weight": torch.randn(1000, 2560), "head.bias": torch.randn(1000)}
torch.save(state, "in.pth")
save_file(state, "in.safetensors")
"""

SCRIPT = """
import os, torch
state = torch.load("in.pth", mmap=True, weights_only=True)
state["head.weight"], state["head.bias"] = torch.randn(10, 2560), torch.randn(10)
with open("out.pth", "wb") as file:
    torch.save(state, file)
    file.flush()
    os.fsync(file.fileno())
"""

EDIT = ("replace", "head", "Linear(_,10)", "-q")


@dataclass(frozen=True)
class Hole:
    """A source of zeros that are never written."""

    name: str
    nbytes: int

    def files(self) -> Iterable[FileId]:
        return ()

    def chunks(self) -> Iterator[bytes]:
        yield bytes(self.nbytes)


def sparse_pth(path: Path, sizes: Sequence[int]) -> None:
    """A .pth of float32 tensors `layers.N.weight` of so many elements: every record on a page, holes for their bytes.

    The checksums are those of the zeros, so that they can be copied like any other's.
    """
    holes = {f"layers.{number}.weight": Hole(str(number), 4 * size) for number, size in enumerate(sizes)}
    tensors = {name: PlannedTensor((hole.nbytes // 4,), "float32", (1,), 0, hole) for name, hole in holes.items()}
    checksums = {nbytes: zlib.crc32(bytes(nbytes)) for nbytes in {hole.nbytes for hole in holes.values()}}
    placed: list[zip_layout.Placed] = []
    for record in torch_zip.layout(Plan(tensors, "")).records:
        start = placed[-1].end if placed else 0
        offset = start + record.offset - record.header
        placed.append(replace(record, header=start, offset=offset + -offset % 4096))
    found = [checksums.get(r.source.nbytes) or zlib.crc32(b"".join(r.source.chunks())) for r in placed]
    with path.open("wb") as file:
        for record, checksum in zip(placed, found, strict=True):
            file.seek(record.header)
            file.write(record.local_header(checksum))
            if not isinstance(record.source, Hole):
                file.write(b"".join(record.source.chunks()))
        file.seek(placed[-1].end)
        file.write(zip_layout.directory(placed, found))


def measure(command: tuple[str, ...]) -> tuple[float, int]:
    """Seconds, and the largest resident memory in MB, of one run on a settled disk."""
    for name in ("out.pth", "out.safetensors", "copy"):
        Path(name).unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {status}")
    return seconds, usage.ru_maxrss // 1024


#: Bounds that were not kept to, in the order of the rows.
missed: list[str] = []


def verdict(title: str, *bounds: tuple[str, bool]) -> str:
    """Each bound with whether it is met."""
    missed.extend(f"{title}: {bound}" for bound, is_met in bounds if not is_met)
    return ", ".join(f"{bound} {'met' if is_met else 'MISSED'}" for bound, is_met in bounds)


def row(title: str, seconds: float, peer: float, memory: int, *bounds: tuple[str, bool]) -> None:
    told = verdict(title, *bounds)
    print(f"{title:52} {seconds:7.3f} s {peer:7.3f} s {seconds / peer:7.3f} {memory:6} MB   {told}", flush=True)


def little_memory(megabytes: int) -> tuple[str, bool]:
    """The bound of what an edit takes above `import torch`."""
    return "<= 150 MB above import torch", megabytes <= 150


def compare() -> None:
    """The rows of an ordinary file system."""
    commands: dict[str, tuple[str, ...]] = {
        "import": (PYTHON, "-c", "import torch"),
        "cp.pth": ("sh", "-c", "cp in.pth copy && sync copy"),
        "edit.pth": (*MODELCLI, *EDIT, "-m", "in.pth", "-o", "out.pth"),
        "cp.safetensors": ("sh", "-c", "cp in.safetensors copy && sync copy"),
        "edit.safetensors": (*MODELCLI, *EDIT, "-m", "in.safetensors", "-o", "out.safetensors"),
        "script": (PYTHON, "script.py"),
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    memory = dict.fromkeys(commands, 0)
    order = list(commands.items())
    for number in range(ROUNDS + 1):
        order.append(order.pop(0))  # none always comes behind the same other one, and pays for what that left
        for name, command in order:
            seconds, peak = measure(command)
            if number:
                times[name].append(seconds)
                memory[name] = max(memory[name], peak)
    median = {name: statistics.median(found) for name, found in times.items()}
    base = median["import"]
    for kind in ("pth", "safetensors"):
        mine = median[f"edit.{kind}"] - base
        above = memory[f"edit.{kind}"] - memory["import"]
        peer = median[f"cp.{kind}"]
        row(f"replace on 2 GB .{kind} / cp", mine, peer, above, ("<= 1.2", mine <= 1.2 * peer), little_memory(above))
    mine, peer = median["script"] - base, median["edit.pth"] - base
    row("plain script / replace on 2 GB .pth", mine, peer, memory["script"], (">= 2.5", mine >= 2.5 * peer))
    sparse_safetensors(Path("in.safetensors"), 20 * 10**9)
    sparse_pth(Path("in.pth"), [6_250_000] * 800)
    for title, *words in (
        ("cast one of 800 tensors, 20 GB sparse / import torch", "cast", "model.layers.0", "half", "safetensors"),
        ("replace one of 800, 20 GB sparse .pth / import torch", "replace", "layers.0", "Linear(3,2)", "pth"),
    ):
        kind = words.pop()
        seconds, peak = measure((*MODELCLI, *words, "-q", "-m", f"in.{kind}", "-o", f"out.{kind}"))
        above = peak - memory["import"]
        row(title, seconds - base, base, above, little_memory(above))


def share_blocks(folder: Path) -> None:
    """The row of a file system that can share blocks: a Btrfs in a file, mounted by a loop, where one can be made."""
    image, place = folder / "btrfs.img", folder / "btrfs"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(8 * 10**9)
    try:
        subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"edit on Btrfs: not measured, no such file system could be made here ({error})")
        return
    try:
        os.chdir(place)
        subprocess.run([PYTHON, "-c", MAKE, str(NBYTES)], check=True)
        subprocess.run([*MODELCLI, "save", "aligned.safetensors", "-m", "in.safetensors", "-q"], check=True)
        edit = (*MODELCLI, *EDIT, "--no-fsync", "-m", "aligned.safetensors", "-o", "out.safetensors")
        look = (*MODELCLI, *EDIT, "-m", "aligned.safetensors")
        times: dict[tuple[str, ...], list[float]] = {edit: [], look: [], (PYTHON, "-c", "import torch"): []}
        for _ in range(ROUNDS):
            for command, found in times.items():
                found.append(measure(command)[0])
        edited, dry, imported = (statistics.median(found) for found in times.values())
        title = "2 GB page-aligned safetensors on Btrfs"
        print(f"{title + ', beyond a dry run':52} {edited - dry:7.3f} s")
        beyond = edited - imported
        told = verdict(title, ("<= 0.2 s", beyond <= 0.2))
        print(f"{title + ', beyond import torch':52} {beyond:7.3f} s   {told}")
    finally:
        os.chdir(folder)
        subprocess.run(["umount", str(place)], check=False)


def main() -> int:
    """Make the files, run the rows; 1 where a bound was missed."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as name:
        folder = Path(name)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.chdir(folder)
        (folder / "script.py").write_text(SCRIPT)
        subprocess.run([PYTHON, "-c", MAKE, str(NBYTES)], check=True)
        print(f"{'':52} {'first':>9} {'second':>9} {'ratio':>7} {'memory':>9}   bound   ({ROUNDS} rounds)")
        compare()
        if shutil.which("mkfs.btrfs"):
            share_blocks(folder)
        else:
            print("edit on Btrfs: not measured, mkfs.btrfs is not installed")
        os.chdir("/")
    for bound in missed:
        print(f"MISSED: {bound}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
