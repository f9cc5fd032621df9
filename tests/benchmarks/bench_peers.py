"""How long tasks take with the tools that people have now: whole processes, interleaved, medians.

    make bench

What can be done with each is done with each: a plain script, torchinfo, graftr (installed for the purpose, beside the
environment; it is a shell whose commands come from standard input and which writes without an fsync).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tests.benchmarks.bench_reading import MODELCLI, PYTHON, TORCHINFO

ROUNDS = int(os.environ.get("ROUNDS", "5"))

MAKE = """
import torch, torchvision
state = torchvision.models.alexnet().state_dict()
torch.save(state, "alexnet.pth")
torch.save({f"module.{name}": tensor for name, tensor in state.items()}, "parallel.pth")
"""

LOOK = """
import torch
state = torch.load("alexnet.pth", weights_only=True)
for name, tensor in state.items():
    print(name, list(tensor.shape), tensor.dtype, tensor.numel())
"""

HEAD = """
import torch, torchvision
from torch import nn
model = torchvision.models.alexnet()
model.load_state_dict(torch.load("alexnet.pth", weights_only=True))
model.classifier[6] = nn.Linear(4096, 10)
model.eval()
with torch.no_grad():
    print(model(torch.zeros(1, 3, 224, 224)).shape)
torch.save(model.state_dict(), "out.pth")
"""

STRIP = """
import torch
state = torch.load("parallel.pth", weights_only=True)
torch.save({name.removeprefix("module."): tensor for name, tensor in state.items()}, "out.pth")
"""

COMPARE = """
import sys, torch
a, b = (torch.load(name, weights_only=True) for name in ("alexnet.pth", "same.pth"))
sys.exit(a.keys() != b.keys() or any(not torch.equal(a[name], b[name]) for name in a))
"""

Command = tuple[tuple[str, ...], str]


def measure(command: Command) -> float:
    """Seconds of one run, with what it is told on standard input."""
    Path("out.pth").unlink(missing_ok=True)
    words, told = command
    start = time.perf_counter()
    done = subprocess.run(words, input=told, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {done.stderr}")
    return time.perf_counter() - start


def task(title: str, tools: Mapping[str, Command]) -> None:
    """One row for each tool, after one round that does not count; the first is modelcli."""
    times: dict[str, list[float]] = {name: [] for name in tools}
    for number in range(ROUNDS + 1):
        for name, command in tools.items():
            seconds = measure(command)
            if number:
                times[name].append(seconds)
    ours = statistics.median(next(iter(times.values())))
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{title:44} {name:10} {median:7.3f} s {median / ours:7.1f} times modelcli", flush=True)
        title = ""


def install_graftr(folder: Path) -> str | None:
    """Its program, where the registry has it."""
    words = [PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "graftr"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"graftr: not measured, it cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        return None
    return str(folder / "bin" / "graftr")


def main() -> None:
    """Make the files, run the tasks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MODELCLI_CACHE"] = str(folder / "cache")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.chdir(folder)
        subprocess.run([PYTHON, "-c", MAKE], check=True)
        subprocess.run(["cp", "alexnet.pth", "same.pth"], check=True)
        graftr = install_graftr(folder / "graftr")

        def with_graftr(file: str, *lines: str) -> dict[str, Command]:
            """On a machine without CUDA it asks first; at the end, of changes that were not saved."""
            told = "\n".join(("y", *lines, "exit", "y", ""))
            return {"graftr": ((PYTHON, graftr, file), told)} if graftr else {}

        ours, script = (lambda *words: ((*MODELCLI, *words), "")), (lambda text: ((PYTHON, "-c", text), ""))
        look = with_graftr("alexnet.pth", "ls features/0", "shape features/0/weight", "parameters .")
        task(
            "the tensors of alexnet.pth (244 MB)",
            {"modelcli": ours("params", "alexnet.pth"), "script": script(LOOK)} | look,
        )
        task(
            "the layers and shapes of resnet50, again",
            {"modelcli": ours("summary", "resnet50"), "torchinfo": script(TORCHINFO)},
        )
        replace = ("replace", "classifier.6", "Linear(_,10)", "-m", "alexnet.pth", "--arch", "alexnet", "-o", "out.pth")
        task("a new head, checked by a forward pass", {"modelcli": ours(*replace), "script": script(HEAD)})
        renamed = with_graftr("parallel.pth", "mv module model", "save out.pth")
        rename = ours("rename", "module.**", "**", "-m", "parallel.pth", "-o", "out.pth")
        task("strip module. from every key", {"modelcli": rename, "script": script(STRIP)} | renamed)
        diff = ours("diff", "alexnet.pth", "same.pth")
        task("compare two files of 244 MB", {"modelcli": diff, "script": script(COMPARE)})
        os.chdir("/")


if __name__ == "__main__":
    main()
