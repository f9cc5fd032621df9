"""How long a look takes, as ratios to a stated peer: whole processes, interleaved, medians.

    make bench

Each row runs a command of modelcli and its peer in turn and prints the median of each, their ratio, and the largest
resident memory of modelcli's process. Absolute times are those of this machine; the ratios are what to quote.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROUNDS = int(os.environ.get("ROUNDS", "9"))
PYTHON = sys.executable
MODELCLI = (PYTHON, "-m", "modelcli")

HELLO = """
import typer
app = typer.Typer()
@app.command()
def hello(name: str = "world") -> None:
    "Say hello."
    print("hello", name)
app()
"""

TABLE = """
import typer
app = typer.Typer()
@app.command()
def table() -> None:
    from rich.console import Console
    from rich.table import Table
    made = Table()
    for name in ("name", "shape", "dtype", "elements", "kind", "trainable"):
        made.add_column(name)
    for number in range(20):
        made.add_row(f"layer.{number}", "[3,3]", "float32", "9", "parameter", "yes")
    Console().print(made)
app()
"""

LOAD = """
import sys
import torch
for name, tensor in torch.load(sys.argv[1], mmap=True, weights_only=True).items():
    print(name, list(tensor.shape), tensor.dtype, tensor.numel())
"""

LOAD_SAFETENSORS = """
import sys
from safetensors.torch import load_file
for name, tensor in load_file(sys.argv[1]).items():
    print(name, list(tensor.shape), tensor.dtype, tensor.numel())
"""

TORCHINFO = """
import torchinfo, torchvision
torchinfo.summary(torchvision.models.resnet50(), input_size=(1, 3, 224, 224), depth=9)
"""


def measure(command: Sequence[str]) -> tuple[float, int]:
    """Seconds, and the largest resident memory in KiB, of one run. A run that fails ends the benchmark."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {status}")
    return seconds, usage.ru_maxrss


def compare(title: str, ours: Sequence[str], peer: Sequence[str], bound: str) -> None:
    """One row: ours and the peer's in turn, after one run of each that does not count."""
    times: dict[bool, list[float]] = {True: [], False: []}
    memory = 0
    for round_number in range(ROUNDS + 1):
        for is_ours in (True, False):
            seconds, peak = measure(ours if is_ours else peer)
            if round_number:
                times[is_ours].append(seconds)
                memory = max(memory, peak) if is_ours else memory
    mine, other = statistics.median(times[True]), statistics.median(times[False])
    print(f"{title:44} {mine:7.3f} s {other:7.3f} s {mine / other:7.3f} {memory / 1024:6.0f} MB   {bound}", flush=True)


def sparse_safetensors(path: Path, nbytes: int, tensors: int = 800, prefix: str = "model.layers") -> None:
    """A safetensors file with a right header and a hole for its bytes."""
    each = nbytes // tensors // 4 * 4
    header = {
        f"{prefix}.{number}.weight": {
            "dtype": "F32",
            "shape": [each // 4],
            "data_offsets": [number * each, (number + 1) * each],
        }
        for number in range(tensors)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + tensors * each)


def main() -> None:
    """Make the files, run the rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MODELCLI_CACHE"] = str(folder / "cache")
        # As installed: what pip compiles is there compiled, and so is what the first round here leaves behind.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.chdir(folder)
        scripts = {"hello": HELLO, "table": TABLE, "load": LOAD, "load_st": LOAD_SAFETENSORS, "torchinfo": TORCHINFO}
        peer = {}
        for script, text in scripts.items():
            (folder / f"peer_{script}.py").write_text(text)
            peer[script] = (PYTHON, f"peer_{script}.py")
        for out in ("alexnet.pth", "alexnet.safetensors"):
            subprocess.run([*MODELCLI, "save", out, "-m", "alexnet", "-q"], check=True, stdout=subprocess.DEVNULL)
        make_many = (
            "import torch, sys; torch.save({f'layer.{i}.weight': torch.zeros(1) for i in range(100_000)}, 'many.pth')"
        )
        subprocess.run([PYTHON, "-c", make_many], check=True)
        sparse_safetensors(folder / "sparse.safetensors", 100 * 10**9)
        print(f"{'':44} {'modelcli':>9} {'peer':>9} {'ratio':>7} {'memory':>9}   bound   ({ROUNDS} rounds)")
        compare("--version / Typer hello", [*MODELCLI, "--version"], peer["hello"], "<= 1.3")
        compare("--help / Typer hello --help", [*MODELCLI, "--help"], [*peer["hello"], "--help"], "<= 1.3")
        for file in ("alexnet.pth", "alexnet.safetensors", "sparse.safetensors"):
            for command in ("params", "modules"):
                compare(f"{command} {file} / Typer + Rich table", [*MODELCLI, command, file], peer["table"], "<= 1.3")
        load = [*peer["load"], "alexnet.pth"]
        compare("params alexnet.pth / torch.load(mmap)", [*MODELCLI, "params", "alexnet.pth"], load, "<= 0.1")
        load = [*peer["load_st"], "alexnet.safetensors"]
        compare("params alexnet.safetensors / load_file", [*MODELCLI, "params", "alexnet.safetensors"], load, "<= 0.1")
        compare(
            "second summary resnet50 / Typer + Rich table", [*MODELCLI, "summary", "resnet50"], peer["table"], "<= 1.6"
        )
        compare("second summary resnet50 / torchinfo", [*MODELCLI, "summary", "resnet50"], peer["torchinfo"], "<= 0.05")
        sparse_safetensors(folder / "a.safetensors", 4 * 10**9)
        sparse_safetensors(folder / "b.safetensors", 4 * 10**9)
        diff = [*MODELCLI, "diff", "a.safetensors", "b.safetensors"]
        compare("diff of two files of 4 GB / cmp", diff, ["cmp", "a.safetensors", "b.safetensors"], "<= 1.6")
        sparse_safetensors(folder / "two.safetensors", 2 * 10**9)
        hashed = [*MODELCLI, "hash", "two.safetensors"]
        compare("hash of a file of 2 GB / sha256sum", hashed, ["sha256sum", "two.safetensors"], "<= 1.3")
        for style in ("json", "csv", "table"):
            seconds, peak = measure([*MODELCLI, "params", "many.pth", "-f", style])
            print(f"{f'params of 100,000 tensors, {style}':44} {seconds:7.3f} s {'':17} {peak / 1024:6.0f} MB   <= 4 s")


if __name__ == "__main__":
    main()
