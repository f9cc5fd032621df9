"""How long edits and checks of checkpoints without an architecture take, none of which needs torch.

    make bench

Three groups of rows, each of whole processes:

- edits of a state dict of 20 kB beside a Typer program that prints a table of 20 rows: what a user waits for;
- edits of 100,000 and of 1,000,000 keys, and the listing of a folder of 165 shards: seconds and resident memory;
- edits and checks of 252 MB and of 2 GB beside sft-cli 0.2.2, which gets an environment of its own. Neither
  waits for the disk. The peer and modelcli run in turn, and the medians are compared.

`GROUPS=small,keys,peers` chooses among them; `ROUNDS` and `KEYS` (100000,1000000) change how much is run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.bench_reading import MODELCLI, PYTHON, TABLE, compare, measure, sparse_safetensors

ROUNDS = int(os.environ.get("ROUNDS", "5"))
KEYS = tuple(map(int, os.environ.get("KEYS", "100000,1000000").split(",")))
GROUPS = os.environ.get("GROUPS", "small,keys,peers").split(",")

SMALL = """
import torch
layers = {f"layers.{i}.{name}": torch.randn(4, 4) for i in range(20) for name in ("weight", "other")}
torch.save(layers, "small.pth")
"""

LARGE = """
import sys
import numpy, ml_dtypes
from safetensors.numpy import save_file
path, nbytes = sys.argv[1], int(sys.argv[2])
draw, state, made, layer = numpy.random.default_rng(0), {}, 0, 0
shapes = {"q": (1024, 1024), "v": (1024, 1024), "up": (2816, 1024), "down": (1024, 2816), "norm": (1024,)}
while made < nbytes:
    for name, shape in shapes.items():
        value = draw.standard_normal(shape, numpy.float32) * numpy.float32(0.02)
        value = value if layer % 2 else value.astype(ml_dtypes.bfloat16)
        state[f"model.layers.{layer}.{name}.weight"] = value
        made += value.nbytes
    layer += 1
save_file(state, path)
"""


def many_keys(path: Path, count: int) -> None:
    """A safetensors file with this many tensors of two float32 elements each."""
    header = {
        f"model.layers.{n // 10}.part{n % 10}.weight": {
            "dtype": "F32",
            "shape": [2],
            "data_offsets": [8 * n, 8 * n + 8],
        }
        for n in range(count)
    }
    text = json.dumps(header, separators=(",", ":")).encode()  # as safetensors writes it
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8 * count))


def shards(folder: Path, files: int = 165, each: int = 558) -> None:
    """A folder laid out as Hugging Face does: 165 sparse shards with 92,070 tensors, and their index."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number in range(1, files + 1):
        name = f"model-{number:05}-of-{files:05}.safetensors"
        sparse_safetensors(folder / name, 4 * 10**9, each, prefix=f"model.shard{number}")
        weight_map |= {f"model.shard{number}.{n}.weight": name for n in range(each)}
    index = {"metadata": {"total_size": files * 4 * 10**9}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_another_process(make: Callable[..., None], *arguments: object) -> None:
    """Run this function elsewhere: the peak memory that Linux reports for a command includes what its parent holds."""
    process = multiprocessing.get_context("fork").Process(target=make, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{make.__name__}{arguments} has failed")


def row(title: str, command: Sequence[str], bound: str, rounds: int = 3) -> None:
    """One row without a peer: the median of the seconds, and the most memory that was resident."""
    runs = [measure(command) for _ in range(rounds)]
    seconds, peak = statistics.median(time for time, _ in runs), max(memory for _, memory in runs)
    print(f"{title:52} {seconds:7.2f} s {'':17} {peak / 1024:6.0f} MB   {bound}", flush=True)


def small_edits() -> None:
    """Edits of 20 kB beside a program that prints a table."""
    subprocess.run([PYTHON, "-c", SMALL], check=True)
    Path("table.py").write_text(TABLE)
    for words in (
        ("rename", "layers.**", "blocks.**"),
        ("remove", "layers.19"),
        ("freeze", "layers.0"),
        ("extract", "layers.3"),
    ):
        ours = [*MODELCLI, *words, "-m", "small.pth", "-o", "out.pth", "--force"]
        compare(f"{words[0]} in 20 kB / Typer + Rich table", ours, (PYTHON, "table.py"), "<= 2")


def edits_of_many_keys(count: int) -> None:
    """Each edit on this many keys, written out."""
    in_another_process(many_keys, Path("many.safetensors"), count)
    seconds, memory = ("4 s", "300 MB") if count <= 100_000 else ("45 s", "3 GB")
    rounds = 3 if count <= 100_000 else 1
    for words in (
        ("rename", "model.**", "**"),
        ("remove", "model.layers.7"),
        ("freeze", "model.layers"),
        ("extract", "model"),
    ):
        ours = [*MODELCLI, *words, "-m", "many.safetensors", "-o", "out.safetensors", "--force", "--no-fsync", "-q"]
        row(f"{words[0]}, {count:,} keys", ours, f"<= {seconds}, {memory}", rounds)
    cast = [*MODELCLI, "cast", ".", "bfloat16", "-m", "many.safetensors", "--dry-run", "-q"]
    row(f"cast, {count:,} keys, --dry-run", cast, f"<= {seconds}", rounds)


def install_sft(folder: Path) -> str | None:
    """The path of sft-cli's program, in an environment of its own; None where the registry does not have it."""
    subprocess.run([PYTHON, "-m", "venv", str(folder)], check=True)
    words = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "sft-cli==0.2.2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"sft-cli: not measured, it cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        return None
    return str(folder / "bin" / "sft")


def beside_sft(sft: str, file: str) -> None:
    """Each task with both programs, on one file."""

    def clean() -> None:
        for name in ("ours.safetensors", "theirs.safetensors"):
            Path(name).unlink(missing_ok=True)
        shutil.rmtree("ours", ignore_errors=True)
        for shard in Path().glob("theirs-*.safetensors"):
            shard.unlink()

    size = f"{Path(file).stat().st_size / 10**6:,.0f} MB"
    written = ("-m", file, "-o", "ours.safetensors", "--no-fsync", "-q")
    theirs = ("-o", "theirs.safetensors")
    split = ("-m", file, "--max-shard-size", "100MB", "--no-fsync", "-q")
    for title, ours, peer in (
        (
            "rename",
            ("rename", "model.**", "**", *written),
            ("rename", file, "--sub", "^model[.]", "--sub", "", *theirs),
        ),
        ("remove", ("remove", "model.layers.1", *written), ("strip", file, "--exclude=model.layers.1.**", *theirs)),
        ("cast", ("cast", ".", "float16", *written), ("cast", file, "--dtype", "fp16", *theirs)),
        (
            "split",
            ("save", "ours/", *split),
            ("split", file, "--max-size", "100MB", "-o", "theirs-{index}.safetensors"),
        ),
        ("statistics", ("params", file, "--stats"), ("stat", file)),
        ("NaN check", ("check", file, "--finite"), ("check", file)),
    ):
        pair(f"{title}, {size} / sft-cli", [*MODELCLI, *ours], [sft, *peer], clean)


def pair(title: str, ours: Sequence[str], peer: Sequence[str], clean: Callable[[], None]) -> None:
    """One row: both programs in turn, after one round that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    peaks = [0, 0]
    for number in range(ROUNDS + 1):
        for side, command in enumerate((ours, peer)):
            clean()
            seconds, peak = measure(command)
            if number:
                times[side].append(seconds)
                peaks[side] = max(peaks[side], peak)
    mine, other = map(statistics.median, times)
    memory = f"{peaks[0] / 1024:6.0f} MB, sft-cli {peaks[1] / 1024:.0f} MB"
    print(f"{title:44} {mine:7.3f} s {other:7.3f} s {mine / other:7.3f} {memory}   <= 1", flush=True)


def main() -> None:
    """Make the files, run the rows."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as name:
        folder = Path(name)
        os.environ["MODELCLI_CACHE"] = str(folder / "cache")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.chdir(folder)
        if "small" in GROUPS:
            small_edits()
        if "keys" in GROUPS:
            for count in KEYS:
                edits_of_many_keys(count)
            in_another_process(shards, folder / "shards")
            row("params of 165 shards, 92,070 tensors", [*MODELCLI, "params", "shards/", "-f", "csv"], "<= 1 s")
        if "peers" in GROUPS and (sft := install_sft(folder / "sft")) is not None:
            for nbytes in (252 * 10**6, 2 * 10**9):
                subprocess.run([PYTHON, "-c", LARGE, "large.safetensors", str(nbytes)], check=True)
                beside_sft(sft, "large.safetensors")
        os.chdir("/")


if __name__ == "__main__":
    main()
