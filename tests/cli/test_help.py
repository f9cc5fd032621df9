"""The output of `--help`: for each command a sentence, two examples that run, and the exit codes."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer
from torch import nn

from modelcli import installed
from modelcli.cli import main
from modelcli.cli.app import app
from modelcli.cli.options import ENDED, EXIT_CODES
from tests.conftest import Cli

PANELS = {"Inspect", "Edit", "Read and write", "Compare", "This program"}


@functools.cache
def commands() -> dict[str, Any]:
    """Return every command by its words, including the commands in groups."""
    root: Any = typer.main.get_command(app)
    found: dict[str, Any] = {}
    for name in root.commands:
        command = root.commands[name]
        found |= {f"{name} {own}": below for own, below in getattr(command, "commands", {}).items()} or {name: command}
    return found


def examples(name: str) -> list[str]:
    return re.findall(r"^modelcli .*", commands()[name].help.replace("\\[", "["), re.MULTILINE)


@pytest.mark.parametrize("name", list(commands()))
def test_a_sentence_two_examples_and_the_exit_codes(name: str, cli: Cli) -> None:
    text = commands()[name].help
    assert re.match(r"[A-Z][^\n]*(\n[^\n]+)?[.]\n", text)
    assert len(examples(name)) >= 2
    assert all(example.startswith(f"modelcli {name}") for example in examples(name))
    shown = " ".join(cli(*name.split(), "--help").out.split())
    assert not re.search(r"<(str|path|int|float)>", shown)  # each value has a name: SELECTOR, FILE
    assert all(" ".join(example.split()) in shown for example in examples(name))
    codes = dict(re.findall(r"(\d+) ([^;.]+)[;.]", shown.partition("Exit codes: ")[2].replace(ENDED, "")))
    assert shown.rstrip().endswith(f"{ENDED}.")
    assert {"0", "2", "130"} <= codes.keys() <= set(map(str, EXIT_CODES))


def test_commands_are_grouped() -> None:
    root: Any = typer.main.get_command(app)
    panels = {root.commands[name].rich_help_panel for name in root.commands}
    assert {"Inspect", "Edit", "Read and write"} <= panels <= PANELS


def test_the_versions_that_are_installed(cli: Cli) -> None:
    found = [metadata.version(package) for package in ("modelcli", "torch", "torchvision", "transformers", "timm")]
    assert cli("--version").out == "modelcli {} (torch {}, torchvision {}, transformers {}, timm {})\n".format(*found)


def test_extras_that_are_not_installed_have_no_version(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real = installed.version
    monkeypatch.setattr(installed, "version", lambda name: None if name in ("timm", "torchvision") else real(name))
    shown = cli("--version").out
    assert "no torchvision" in shown
    assert "timm" not in shown
    assert "transformers" in shown


def test_versions_import_no_library() -> None:
    code = "import sys; from modelcli.cli import main; main(['--version']); " + (
        "sys.exit(bool({'torch', 'timm', 'transformers', 'torchvision'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("words", ["-V", "version"])
def test_other_ways_to_ask_for_the_versions(words: str, cli: Cli) -> None:
    assert cli(words).out == cli("--version").out


@pytest.mark.parametrize("name", ["replace", "cache warm"])
def test_help_as_a_command(name: str, cli: Cli) -> None:
    assert cli("help", *name.split()).out.split() == cli(*name.split(), "--help").out.split()
    assert cli("help").out.split() == cli("--help").out.split()


def test_help_of_a_command_that_does_not_exist_names_the_nearest(cli: Cli) -> None:
    found = cli("help", "replcae", code=2)
    assert "modelcli has no command 'replcae'" in found.err
    assert "replace" in found.err.partition("hint:")[2]


def test_defaults_in_brackets_are_not_taken_for_markup(cli: Cli) -> None:
    shown = " ".join(cli("freeze", "--help").out.split())
    assert "The model. [default: the working" in shown
    assert "The seed of random values. [default: 0]" in shown


#: Examples that exit with code 1 here.
NO = ("modelcli diff best.pth frozen.pth", "modelcli identify bare.pth --json")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples use. It is created once."""
    folder = tmp_path_factory.mktemp("prepared")
    here = Path.cwd()
    os.chdir(folder)
    try:
        shutil.copy(Path(__file__).parents[1] / "nets.py", "nets.py")
        assert main(["save", "best.pth", "-m", "resnet18", "-q"]) == 0
        assert main(["freeze", ".", "-m", "best.pth", "-o", "frozen.pth", "-q"]) == 0
        torch.save({f"module.{key}": value for key, value in nn.Linear(2, 3).state_dict().items()}, "parallel.pth")
        torch.save({f"head.{key}": value for key, value in nn.Linear(2, 3).state_dict().items()}, "bare.pth")
        fp8 = {"mlp.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "mlp.weight_scale_inv": torch.ones(1, 1)}
        safetensors.torch.save_file(fp8, "fp8.safetensors")
        Path("head10.toml").write_text('model = "resnet18"\nedits = ["replace fc Linear(_,10)"]\n')
        edits = '["freeze bn1", "freeze layer1", "freeze layer2", "freeze layer3"]'
        Path("modelcli.toml").write_text(f'model = "resnet18"\nedits = {edits}\n')
    finally:
        os.chdir(here)
    return folder


@pytest.mark.parametrize("name", list(commands()))
def test_every_example_runs(
    name: str, cli: Cli, folder: Path, prepared: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "identify":
        monkeypatch.setenv("MODELCLI_CACHE", str(warm_cache))
    for example in examples(name):
        for file in folder.iterdir():
            if file.is_file():
                file.unlink()
        for file in prepared.iterdir():
            if file.is_file():
                (shutil.copy if file.suffix == ".toml" else os.link)(file, folder / file.name)
        if name == "load":
            (folder / "modelcli.toml").unlink()  # it starts one
        words = shlex.split(example.partition(" > ")[0])
        says_no = example in NO
        cli(*words[1:], code=int(says_no))
