"""A package whose code fails: one message that names it, the right exit code, and nothing else suffers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modelcli import plug_ins
from modelcli.checkpoints import shapes
from modelcli.cli import main
from tests.conftest import Cli
from tests.plugin.conftest import forget
from tests.plugin.installing import register

pytestmark = pytest.mark.usefixtures("plugin")
FAILED = "broken 2.5, which adds to modelcli, failed: ZeroDivisionError: division by zero"

EDIT = """
from dataclasses import dataclass
from modelcli_plugin.clamp import Clamp
@dataclass(frozen=True, kw_only=True)
class Edit(Clamp):
    name = "wreck"
    handler = "broken_package.handler"
"""
HANDLER = """
from modelcli_plugin.clamp_live import *
from modelcli_plugin import clamp_live
from modelcli.live.surgery import changed_values
"""
FORMAT = """
from modelcli_plugin.blob import Blob
class Format(Blob):
    name = "wreck"
    title = "a wreck"
    suffixes = written_suffixes = (".wreck",)
    def recognises(self, file):
        return file.head.startswith(b"wreck")
"""
PROVIDER = """
from modelcli_plugin.tiny import Tiny
class Provider(Tiny):
    name = prefix = "wreck"
    live = "broken_package.live:Live"
"""
LIVE = """
from modelcli_plugin.tiny_live import LiveTiny
class Live(LiveTiny):
    pass
"""


@pytest.fixture
def files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with `v.pth`, in which the package `broken` is installed, which adds one thing of each kind."""
    torch.save({"w": torch.ones(2), "layer.weight": torch.ones(3, 3)}, "v.pth")
    register(folder, "broken", "2.5", POINTS)
    package = folder / "broken_package"
    package.mkdir()
    parts = {"__init__": "", "edit": EDIT, "handler": HANDLER, "format": FORMAT, "provider": PROVIDER, "live": LIVE}
    for name, text in parts.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "broken_package"]:
        monkeypatch.delitem(sys.modules, name)
    forget()
    return folder


POINTS = {
    plug_ins.EDITS: {"wreck": "broken_package.edit:Edit"},
    plug_ins.FORMATS: {"wreck": "broken_package.format:Format"},
    plug_ins.PROVIDERS: {"wreck": "broken_package.provider:Provider"},
}


def add(files: Path, module: str, text: str) -> None:
    path = files / "broken_package" / f"{module}.py"
    path.write_text(path.read_text() + text)


def method(name: str) -> str:
    return f"    def {name}(self, *words, **named):\n        return 1 / 0\n"


def function(name: str) -> str:
    return f"def {name}(*words, **named):\n    return 1 / 0\n"


WRECK = ("wreck", "w", "0", "1", "-m", "v.pth")
HOOKS = {
    "from_operands": ("edit", "    from_operands = classmethod(lambda cls, words: 1 / 0)\n", (*WRECK, "--dry-run")),
    "operands": ("edit", method("operands"), (*WRECK, "--dry-run")),
    "import of the handler": ("handler", "1 / 0\n", (*WRECK, "--dry-run")),
    "carry_out": ("handler", function("carry_out"), ("wreck", "0", "0", "1", "-m", "Sequential(Linear(2,3))")),
    "apply_to_state_dict": ("handler", function("apply_to_state_dict"), (*WRECK, "-o", "out.pth")),
    "values": (
        "handler",
        "def _late(values):\n    return values if len(values) == 1 else 1 / 0\n"
        "def apply_to_state_dict(edit, model, context):\n"
        "    changed = changed_values.change_values_of_keys(model, ['w'], _late)\n"
        "    return Applied(changed, clamp_live.apply_to_state_dict(edit, model, context).changes)\n",
        (*WRECK, "-o", "out.pth"),
    ),
    "state_dict_script_lines": (
        "handler",
        function("state_dict_script_lines"),
        ("script", "-m", "v.pth", "-e", "wreck w 0 1", "-o", "out.pth"),
    ),
    "script_lines": (
        "handler",
        function("script_lines"),
        ("script", "-m", "Sequential(Linear(2,3))", "-e", "wreck 0 0 1", "-o", "out.pth"),
    ),
    "recognises": ("format", method("recognises"), ("params", "./unknown")),
    "explain": ("format", method("explain"), ("params", "./unknown")),
    "read": ("format", method("read"), ("params", "v.wreck")),
    "layout": ("format", method("layout"), ("save", "out.wreck", "-m", "v.pth")),
    "verify": ("format", method("verify"), ("save", "out.wreck", "-m", "v.pth")),
    "script_writes": (
        "format",
        method("script_writes"),
        ("script", "-m", "v.pth", "-e", "freeze w", "-o", "out.wreck"),
    ),
    "parse": ("provider", method("parse"), ("params", "wreck:mlp")),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_is_the_fault_of_its_package(
    hook: str, cli: Cli, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, text, words = HOOKS[hook]
    add(files, module, text)
    Path("unknown").write_bytes(b"nothing that anybody knows")
    Path("v.wreck").write_bytes(b"wreck")
    there = sorted(files.iterdir())
    failed = cli(*words, code=5)
    assert failed.err.splitlines()[-2:] == [
        f"error: {FAILED}",
        "hint: --debug shows the traceback; report it to the authors of broken 2.5, or uninstall it",
    ]
    assert "Traceback" not in failed.err
    assert [path for path in sorted(files.iterdir()) if path.name != "__pycache__"] == there
    error = json.loads(cli(*words, "--json", code=5).err.splitlines()[-1])["error"]
    assert (error["kind"], error["exit_code"]) == ("plug-in", 5)
    assert main([*words, "--debug"]) == 5
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert f"broken_package/{module}.py" in shown.replace(os.sep, "/")
    cli("params", "v.pth")
    cli("clamp", "w", "0", "0.5", "-m", "v.pth", "-o", "clamped.pth")
    cli("save", "v.blob", "-m", "v.pth")
    cli("params", "v.blob")
    assert "wreck" in cli("--help").out


NOTE = "the provider wreck of broken 2.5 failed: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("module", "text", "words", "code", "said"),
    [
        ("live", method("build"), ("params", "wreck:mlp"), 2, "wreck:mlp: division by zero"),
        ("live", method("inputs"), ("summary", "wreck:mlp"), 5, FAILED),
        ("live", method("parameters"), ("params", "wreck:mlp"), 5, FAILED),
        ("live", method("published"), ("list", "wreck:"), 2, NOTE),
        ("live", method("published"), ("list",), 0, NOTE),
        ("live", method("expression"), ("script", "-m", "wreck:mlp", "-e", "freeze 0", "-o", "out.pth"), 5, FAILED),
        ("provider", method("names"), ("list", "wreck:"), 2, NOTE),
        ("provider", method("names"), ("list",), 0, NOTE),
        ("provider", method("is_known_code"), ("params", "wreck.pth"), 5, FAILED),
    ],
)
def test_a_provider_that_raises(
    module: str, text: str, words: tuple[str, ...], code: int, said: str, cli: Cli, files: Path
) -> None:
    if words[-1] == "wreck.pth":
        cli("save", "wreck.pth", "-m", "wreck:mlp")
    for name in [name for name in sys.modules if name.partition(".")[0] == "broken_package"]:
        del sys.modules[name]
    forget()
    add(files, module, text)
    assert said in cli(*words, code=code).err
    cli("params", "v.pth")
    cli("params", "tiny:mlp")


def test_a_bug_of_modelcli_is_not_blamed_on_a_package(files: Path) -> None:
    with pytest.raises(ValueError, match="shape") as raised:
        shapes.shape(None, "a bug")
    assert plug_ins.at_fault(raised.value) is None


def test_two_packages_with_one_name(cli: Cli, files: Path) -> None:
    """Neither is used where it is asked for: which one it would be depends on the order of installation."""
    register(files, "other", "1.0", POINTS)
    forget()
    both = "wreck is registered by broken 2.5 and other 1.0"
    for words in (WRECK, ("params", "wreck:mlp")):
        failed = cli(*words, code=5).err
        assert both in failed
        assert "hint: uninstall all but one of them" in failed
    Path("v.wreck").write_bytes(b"wreck")
    assert f"the format {both}" in cli("params", "v.wreck", code=4).err
    assert f"the format {both}" in cli("save", "out.wreck", "-m", "v.pth", code=2).err
    assert f"the provider {both}" in cli("list", "squeezenet1_1").err
    cli("params", "v.pth")
    cli("params", "tiny:mlp")
    assert "wreck" in cli("--help").out


def test_two_formats_that_call_themselves_the_same(cli: Cli, files: Path) -> None:
    register(files, "other", "1.0", {plug_ins.FORMATS: {"another": "broken_package.format:Format"}})
    forget()
    Path("v.wreck").write_bytes(b"wreck")
    failed = cli("params", "v.wreck", code=4).err
    assert "the format wreck of broken 2.5 is not used: another package has a format that is called wreck too" in failed
    cli("params", "v.pth")


def test_an_entry_point_that_is_no_dotted_name(cli: Cli, files: Path) -> None:
    register(files, "other", "1.0", {group: {"odd": "not a name:::"} for group in plug_ins.KINDS})
    forget()
    assert "the edit odd of other 1.0 cannot be loaded" in cli("odd", "w", "-m", "v.pth", code=5).err
    assert "the provider odd of other 1.0 cannot be loaded" in cli("params", "odd:w", code=5).err
    cli("params", "v.pth")
    cli(*WRECK, "-o", "out.pth")
    assert "odd" in cli("--help").out


def test_a_package_that_ends_the_program(files: Path, site: list[Path]) -> None:
    """In a process of its own, as a user runs it."""
    add(files, "handler", "import sys\ndef apply_to_state_dict(*words):\n    sys.exit(7)\n")
    code = f"import sys; sys.path[:0] = {[*map(str, [files, *site])]}; from modelcli.cli import run; run()"
    done = subprocess.run([sys.executable, "-c", code, *WRECK], capture_output=True, text=True)
    assert done.returncode == 5
    assert "broken 2.5, which adds to modelcli, failed: ended the program: exit code 7" in done.stderr
