"""Tests that need a process of their own: exit codes, signals, pipes, start-up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from modelcli.commands import identify
from tests.checkpoints import test_distributed
from tests.values.test_statistics import sparse_file

PROGRAM = [sys.executable, "-m", "modelcli"]


def test_the_installed_program_and_the_module(folder: Path) -> None:
    for program in (PROGRAM, [str(Path(sys.executable).parent / "modelcli")]):
        done = subprocess.run([*program, "summary", "alexnt"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "did you mean alexnet?" in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("code", "words", "out", "err"),
    [
        (0, ["params", "a.safetensors", "-f", "csv"], "w,[2],float32,2,8,parameter,", ""),
        (0, ["diff", "a.safetensors", "a.safetensors"], "are the same: 1 tensor is equal", ""),
        (0, ["check", "a.safetensors", "--max-params", "2"], "Checks: 1 of 1 passed", ""),
        (1, ["diff", "a.safetensors", "b.safetensors"], "Tensors: 1 differs, 0 are equal", ""),
        (1, ["check", "a.safetensors", "--max-params", "1"], "Checks: 0 of 1 passed", ""),
        (1, ["identify", "a.safetensors"], "no model that modelcli list shows is close to a.safetensors", ""),
        (1, ["load", "a.safetensors", "--arch", "Linear(2,3)"], "w       unexpected", "a.safetensors does not fit"),
        (2, ["params", "nowhere.pth"], "", "no such file: nowhere.pth"),
        (3, ["freeze", ".", "-m", "whole.pth", "-o", "out.pth"], "", "whole.pth holds objects of"),
        (4, ["params", "broken.pth"], "", "broken.pth is not a checkpoint"),
    ],
)
def test_exit_codes_and_streams(folder: Path, code: int, words: list[str], out: str, err: str) -> None:
    """Results go to standard output and errors to standard error. The exit code tells the kind of error."""
    sparse_file(folder / "a.safetensors", {"w": [2]})
    sparse_file(folder / "b.safetensors", {"w": [3]})
    (folder / "broken.pth").write_text("junk")
    if "whole.pth" in words:
        import torch

        torch.save(torch.nn.Linear(2, 3), "whole.pth")
    if "identify" in words:
        identify.keep(["alexnet"], complete=True)  # nearly all of its time is spent on building the others
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert out in done.stdout
    assert (done.stdout == "") == (out == "")
    assert done.stderr.startswith(f"error: {err}" if err else "")
    assert (done.stderr == "") == (err == "")
    assert not (folder / "out.pth").exists()


def test_exit_handlers_run_and_threads_of_a_model_are_awaited(folder: Path) -> None:
    """The program ends without Python's slow cleanup, but after exit handlers have run and threads have ended."""
    handler = "import atexit, nets\natexit.register(lambda: open('ended', 'w').close())\n"
    thread = "import threading, time\ndef late():\n    time.sleep(1)\n    open('late', 'w').close()\n"
    (folder / "handler.py").write_text(f"{handler}Net = nets.Net\n")
    (folder / "thread.py").write_text(f"{handler}{thread}threading.Thread(target=late).start()\nNet = nets.Net\n")
    for file, expected in (("handler.py", ["ended"]), ("thread.py", ["ended", "late"])):
        done = subprocess.run([*PROGRAM, "params", f"{file}:Net", "-f", "csv"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1].startswith("scale,")
        assert [name for name in ("ended", "late") if Path(name).exists()] == expected
        Path("ended").unlink()


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
def test_a_closed_pipe_ends_quietly(folder: Path) -> None:
    line = f"{' '.join(PROGRAM)} params vgg16 | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout.splitlines()[0].split()[:3] == ["name", "shape", "dtype"]
    assert done.stdout.splitlines()[1] == "0"
    assert done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="terminals are otherwise there")
def test_a_terminal_without_unicode(folder: Path) -> None:
    """Characters that the encoding lacks are escaped and cause no error."""
    import pty

    import torch

    torch.save({"größe.模型": torch.zeros(2)}, "m.pth")
    main_end, terminal = pty.openpty()
    asked = [sys.executable, "-m", "modelcli", "params", "m.pth"]
    settings = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
    done = subprocess.run(asked, stdout=terminal, stderr=subprocess.PIPE, env=settings)
    os.close(terminal)
    shown = os.read(main_end, 100_000).decode("ascii")
    os.close(main_end)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "gr\\xf6\\xdfe.\\u6a21\\u578b" in shown


#: Environment variables that decide what a terminal shows; tests remove the caller's values.
LEFT_OUT = ("COLUMNS", "LINES", "LC_ALL", "LC_CTYPE", "LANG", "NO_COLOR")


def terminal_output(words: list[str], columns: int, settings: dict[str, str]) -> str:
    """Return what the program writes to a terminal whose width is only in the variable COLUMNS."""
    import fcntl
    import pty
    import struct
    import termios

    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    known = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    subprocess.run([*PROGRAM, *words], stdin=terminal, stdout=terminal, stderr=terminal, env=known | settings)
    os.close(terminal)
    written = os.read(main_end, 100_000).decode()
    os.close(main_end)
    return written


@pytest.mark.skipif(os.name == "nt", reason="terminals are otherwise there")
def test_the_locale_c_gets_ascii(folder: Path) -> None:
    import torch

    torch.save(torch.nn.Linear(2, 3).state_dict(), "m.pth")
    for locale, ascii_alone in (
        ({"LC_ALL": "C"}, True),
        ({"LC_ALL": "C.UTF-8"}, False),
        ({"LC_CTYPE": "C"}, True),
        ({"LANG": "POSIX"}, True),
        ({"LC_ALL": "", "LC_CTYPE": "", "LANG": "C"}, True),
        ({"LC_ALL": "C.UTF-8", "LC_CTYPE": "C", "LANG": "C"}, False),
        ({"LC_CTYPE": "C.UTF-8", "LANG": "C"}, False),
        ({}, False),
    ):
        written = terminal_output(["modules", "m.pth"], 80, {"TERM": "xterm", **locale})
        assert written.isascii() == ascii_alone, locale
    piped = subprocess.run([*PROGRAM, "modules", "m.pth"], capture_output=True, env=os.environ | {"LC_ALL": "C"})
    assert piped.returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="terminals are otherwise there")
@pytest.mark.parametrize(("value", "coloured"), [(None, True), ("", True), ("1", False), ("0", False)])
def test_no_color_means_the_same_to_tables_and_messages(folder: Path, value: str | None, coloured: bool) -> None:
    settings = {"TERM": "xterm-256color"} | ({} if value is None else {"NO_COLOR": value})
    shown = terminal_output(["list", "resnet1*"], 100, settings)
    told = terminal_output(["list", "nothing"], 100, settings)
    assert (bool(re.search(r"\x1b\[[\d;]*3\dm", shown)), "\x1b[" in told) == (coloured, coloured)


@pytest.mark.skipif(os.name == "nt", reason="terminals are otherwise there")
@pytest.mark.parametrize("columns", [60, 100])
def test_a_dumb_terminal_has_its_own_width_and_no_colour(folder: Path, columns: int) -> None:
    import torch

    torch.save({f"{'long_name.' * 20}{number}.weight": torch.zeros(2) for number in range(3)}, "m.pth")
    written = terminal_output(["params", "m.pth"], columns, {"TERM": "dumb", "LC_ALL": "C.UTF-8"})
    assert "\x1b" not in written
    widths = {len(line) for line in written.split("\r\n")}
    assert max(widths) <= columns
    assert max(widths) > columns - 5


@pytest.mark.skipif(os.name == "nt", reason="signals come otherwise there")
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "ended by SIGTERM"),
        (signal.SIGHUP, "ended by SIGHUP"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_signals(folder: Path, number: signal.Signals, message: str, as_json: bool) -> None:
    (folder / "slow.py").write_text("import time\nopen('up', 'w').close()\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [*PROGRAM, "save", "out.pth", "-m", "slow.py:Net", *(["--json"] if as_json else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background inherits that SIGINT is ignored; at a terminal it is not.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    while not (folder / "up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    if as_json:
        body = {"kind": "signal", "message": message, "hint": None, "exit_code": 128 + number}
        assert json.loads(error) == {"schema": 1, "error": body}
    else:
        assert error.strip() == message
    assert {path.name for path in folder.iterdir()} <= {"nets.py", "slow.py", "up", "__pycache__"}


HIDE = """
    import pathlib, sys, importlib.util
    import torch
    # Beside a torch that they do not match, torchvision's compiled operators do not load.
    real = torch.ops.load_library
    def load_library(path):
        if "torchvision" in str(path):
            raise OSError("undefined symbol")
        return real(path)
    torch.ops.load_library = load_library
    try:
        import torchvision
    except RuntimeError as error:
        assert "torchvision::nms" in str(error), error
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        raise SystemExit("the compiled operators were not hidden")
    from modelcli.cli import main
    raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("builder", ["alexnet", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_torchvision_beside_a_torch_it_does_not_match(folder: Path, builder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(HIDE), "summary", builder],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Total params:" in done.stdout


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (["--version"], ("torch", "torchvision", "numpy", "rich", "typer", "importlib.metadata")),
        (["--help"], ("torch", "torchvision", "numpy", "safetensors", "tomlkit", "modelcli.checkpoints")),
        (["params", "--help"], ("torch", "torchvision", "numpy", "safetensors", "tomlkit", "modelcli.checkpoints")),
        (["params", "small.pth"], ("torch", "torchvision", "numpy", "safetensors", "rich.console", "zipfile")),
        (["modules", "small.pth", "--tree"], ("torch", "torchvision", "numpy", "safetensors", "tomlkit")),
        (["summary", "small.pth", "--json"], ("torch", "torchvision", "numpy", "safetensors")),
        *(
            ([command, file], ("torch", "torchvision", "numpy", "safetensors", "rich.console"))
            for command in ("params", "modules", "summary")
            for file in ("small.safetensors", "shards/", "ck/", "old.pth", "whole.pth", "written.pth")
        ),
        (["log", "--recipe", "r.toml"], ("torch", "torchvision", "numpy")),
        (["replace", "a", "Linear(2,3)", "-m", "small.pth", "-o", "out.pth"], ("torchvision",)),
        (["cast", "a", "half", "-m", "small.safetensors", "-o", "out.safetensors"], ("torchvision",)),
    ],
)
def test_which_packages_each_command_imports(folder: Path, words: list[str], forbidden: tuple[str, ...]) -> None:
    """Showing a file does not import torch, and `--version` does not import Rich."""
    import torch
    from safetensors.torch import save_file

    from modelcli.cli import main

    state = {"a.weight": torch.zeros(2)}
    torch.save(state, "small.pth")
    torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 3), "whole.pth")
    save_file(state, "small.safetensors")
    test_distributed.saved(state, folder / "ck")
    assert main(["save", "written.pth", "-m", "Linear(2,3)"]) == main(["save", "shards/", "-m", "small.pth"]) == 0
    (folder / "r.toml").write_text('model = "alexnet"\n')
    code = "import sys; from modelcli.cli import main; assert main(sys.argv[1:]) == 0; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()[-1].split()) & set(forbidden) == set()


@pytest.mark.parametrize("words", ["modelcli su", "modelcli params --st", "modelcli replace "])
def test_which_packages_completion_imports(folder: Path, words: str) -> None:
    code = """
        import contextlib, sys
        from modelcli.cli import main
        with contextlib.suppress(SystemExit):
            main([])
        print(*sys.modules)
    """
    typed = {
        "_MODELCLI_COMPLETE": "complete_bash",
        "COMP_WORDS": words.replace(" ", "\n"),
        "COMP_CWORD": str(words.count(" ")),
    }
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | typed)
    *offered, modules = done.stdout.splitlines()
    if words == "modelcli su":
        assert offered == ["summary"]
    assert "modelcli.cli" in modules.split()
    assert set(modules.split()) & {"torch", "torchvision", "numpy", "safetensors", "modelcli.live"} == set()
    assert ("tomlkit" in modules.split()) == (words == "modelcli replace ")  # the paths are those of the recipe's model


def test_the_python_api_is_lazy() -> None:
    code = "import sys, modelcli; modelcli.__version__; print('torch' in sys.modules, callable(modelcli.load))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False True"
