"""Each command's output compared with a golden file: in a pipe, and on terminals of 80 and 200 columns.

`make golden` writes the files anew; read their diff. These tests pin how the output looks. Other tests compare the
numbers in it with PyTorch.
"""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import pytest

from modelcli.cli import main
from tests.needs import COMPLETE, torch_version

GOLDEN = Path(__file__).parents[1] / "golden"

COMMANDS = {
    "summary-alexnet": "summary alexnet",
    "params-alexnet": "params alexnet",
    "modules-alexnet": "modules alexnet",
    "summary-resnet18": "summary resnet18",
    "params-resnet18": "params resnet18",
    "modules-resnet18": "modules resnet18",
    "summary-unusual": "summary nets.py:Unusual --input-size 2,4",
    "params-unusual": "params nets.py:Unusual",
    "modules-unusual": "modules nets.py:Unusual",
    "tree-unusual": "modules nets.py:Unusual --tree",
    "summary-vit": "summary vit_b_16",
    "params-vit": "params vit_b_16 -s encoder.layers.encoder_layer_[9-11]",
    "list-rcnn": "list rcnn",
    "summary-vit-sorted": "summary vit_b_16 --sort params --depth 4",
    "summary-vit-expanded": "summary vit_b_16 --expand --depth 3",
    "tree-vit": "modules vit_b_16 --tree",
    "summary-ssdlite": "summary ssdlite320_mobilenet_v3_large --depth 1",
    "replace-alexnet": "replace classifier.6 Linear(_,10) -m alexnet",
    "freeze-alexnet": "freeze . --except classifier.6 -m alexnet",
    "diff-alexnet": "diff alexnet alexnet(num_classes=10) --no-values",
    "check-alexnet": "check alexnet --max-params 60M --has classifier.6:Linear --frozen features --output-shape 1,1000",
    "memory-resnet18": "memory resnet18 --train adamw --batch 8",
    "memory-resnet18-modules": "memory resnet18 --train sgd --batch 8 --top 5",
    "load-mismatch": "load bare.pth --arch Linear(2,4)",
}


@pytest.fixture(autouse=True)
def _same_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspaces of cuBLAS have the size that they have on a Hopper GPU, whatever this machine has."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Terminal(io.StringIO):
    """A text stream whose `isatty()` returns True."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def norms_report_bias() -> bool:
    """Whether this version of torch prints `bias=True` for a LayerNorm. Older versions do not."""
    import torch

    found = "bias=" in torch.nn.LayerNorm(1).extra_repr()
    assert found or torch_version() < COMPLETE
    return found


def checked(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"no golden file {path.name}: make golden writes it"
    if name.startswith(("modules-resnet18", "tree-vit")) and not norms_report_bias():
        pytest.skip("needs a newer torch, whose norms report whether they have a bias")
    assert text == path.read_text(encoding="utf-8")


@pytest.fixture
def _bare(folder: Path) -> None:
    import torch

    torch.save(torch.nn.Linear(2, 3).state_dict(), "bare.pth")


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize("name", list(COMMANDS))
def test_in_a_pipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(COMMANDS[name].split())
    checked(name, capsys.readouterr().out)


#: Reset, bold, dim, red, cyan: each theme gives these a colour that is read on its background, dark or light. White,
#: yellow, bright colours and backgrounds are not among them.
READABLE = {"", "0", "1", "2", "31", "36"}

NARROW = ["summary-vit", "modules-resnet18", "params-vit", "tree-vit", "replace-alexnet", "list-rcnn"]


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize(
    ("name", "width"),
    [(name, width) for name in COMMANDS for width in (80, 200)] + [(name, 60) for name in NARROW],
)
def test_on_a_terminal(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is wider than the terminal, no number is cut, and the words are the same as in a pipe."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    main(COMMANDS[name].split())
    text = terminal.getvalue()
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    table = bare.partition("\n\n")[0] if "replace" not in name else bare
    assert all(len(line) <= width for line in table.split("\n"))
    assert ("\x1b[" in text) == (not name.startswith("tree"))
    used = {code for codes in re.findall(r"\x1b\[([0-9;]*)m", text) for code in codes.split(";")}
    assert used <= READABLE
    checked(f"{name}-{width}", bare)


@pytest.mark.parametrize("name", ["summary-vit", "tree-vit"])
def test_on_a_terminal_that_shows_ascii(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    class Ascii(Terminal):
        encoding = "ascii"

    terminal = Ascii()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    main(COMMANDS[name].split())
    text = terminal.getvalue()
    assert text.isascii()
    assert "\x1b" not in text
    assert "\\" not in text
    checked(f"{name}-ascii", text)
