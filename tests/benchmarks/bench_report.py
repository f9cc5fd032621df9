"""How long the page of a large model takes: to make, to load in Chromium, and to fold; and how large it is.

The peer of making is `modelcli params` of the same file, which reads the same header and prints a row a tensor.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tests import browser
from tests.browser import Browser

_FOLD = """(() => {
    const row = %s;
    const start = performance.now();
    modelcliPage.%s(row);
    document.body.offsetHeight;
    return performance.now() - start;
})()"""
_ROOT = "document.querySelector('#rows .row')"


def save(path: Path, tensors: int, *, alike: bool) -> None:
    """Save a state dict of this many tensors: all of one shape in equal layers, or each of a shape of its own."""
    base = torch.zeros(tensors + 3, 3)
    if alike:
        state = {f"model.layers.{n // 8}.part{n % 8}.weight": base[:3] for n in range(tensors)}
    else:
        state = {f"encoder.part{n % 97}.layer{n}.weight": base[: n + 1] for n in range(tensors)}
    torch.save(state, path)


def seconds(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "modelcli", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def run(opened: Browser | None, name: str, tensors: int, *, alike: bool) -> None:
    save(Path("made.pth"), tensors, alike=alike)
    peer = min(seconds("params", "made.pth", "-q") for _ in range(2))
    made = min(seconds("report", "made.pth", "--force", "-q") for _ in range(2))
    print(
        f"{name}: made in {made:.2f} s (params: {peer:.2f} s), {Path('made.html').stat().st_size / 1e6:.2f} MB", end=""
    )
    if opened is None:
        print("; no Chromium")
        return
    timing = "performance.timing.loadEventEnd - performance.timing.navigationStart"
    loads = []
    for _ in range(3):
        opened.open(Path("made.html"))
        loads.append(opened.run(timing))
    opened.run("document.getElementById('unfold').click()")
    opened.settle()
    folds = []
    for _ in range(3):
        folds += [opened.run(_FOLD % (_ROOT, "fold")), opened.run(_FOLD % (_ROOT, "open"))]
        opened.settle()
    rows = opened.run("document.querySelectorAll('#rows .row').length")
    fold, unfold = min(folds[::2]), min(folds[1::2])
    print(f"; loads in {min(loads):.0f} ms; {rows} rows fold in {fold:.0f} ms, unfold in {unfold:.0f} ms")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        opened = Browser() if browser.executable() is not None else None
        try:
            run(opened, "10,000 modules, all different", 10_000, alike=False)
            run(opened, "10,000 modules, alike", 10_000, alike=True)
            run(opened, "100,000 tensors, all different", 100_000, alike=False)
            run(opened, "100,000 tensors, alike", 100_000, alike=True)
        finally:
            if opened is not None:
                opened.__exit__()
        os.chdir("/")


if __name__ == "__main__":
    main()
