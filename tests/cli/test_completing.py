"""Completion through a real bash, and by the requests that the scripts for zsh and fish send to the program."""

from __future__ import annotations

import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.conftest import Cli

pytestmark = pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="no bash")


class Bash:
    """A bash with the completion function that the program generates."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        program = self.bin / "modelcli"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -X importtime -m modelcli "$@"\n')
        program.chmod(0o755)
        self.imported: set[str] = set()
        self.script = self.run("_MODELCLI_COMPLETE=source_bash modelcli").stdout

    def run(self, text: str, **settings: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": path} | settings
        done = subprocess.run(["bash", "--norc", "-c", text], capture_output=True, text=True, env=environment)
        self.imported |= set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))
        told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert (done.returncode, told) == (0, []), done.stderr
        return done

    def __call__(self, *words: str, **settings: str) -> list[str]:
        """Return the completions of the last of these words."""
        listed = " ".join(map(shlex.quote, ("modelcli", *words)))
        asked = f"COMP_WORDS=({listed}); COMP_CWORD={len(words)}; _modelcli_completion modelcli"
        done = self.run(f'{self.script}\n{asked}\nprintf "%s\\n" "${{COMPREPLY[@]}}"', **settings)
        return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


@pytest.fixture
def bash(folder: Path) -> Bash:
    return Bash(folder)


def test_commands_and_options(bash: Bash) -> None:
    assert bash("fre") == ["freeze"]
    assert {"summary", "params", "freeze", "unfreeze", "load", "save", "log", "cache"} <= set(bash(""))
    assert bash("summary", "alexnet", "--dep") == ["--depth"]
    assert bash("cache", "wa") == ["warm"]


def test_options_with_a_few_allowed_values(bash: Bash) -> None:
    assert bash("summary", "alexnet", "--format", "") == ["table", "json", "csv", "markdown"]
    assert bash("freeze", "x", "--check", "r") == ["run"]
    assert bash("summary", "--sort", "p") == ["params", "path"]
    assert bash("params", "--sort", "el") == ["elements"]
    assert bash("summary", "--mode", "t") == ["train"]
    assert {"none", "DEFAULT", "IMAGENET1K_V1"} <= set(bash("load", "alexnet", "--weights", ""))
    assert bash("summary", "--input-dtype", "bf") == ["bfloat16"]


def test_weights_of_timm_are_the_tags_of_the_model(bash: Bash) -> None:
    tags = {name.partition(".")[2] for name in timm.list_pretrained("resnet18.*")}
    assert {"none", "DEFAULT"} | tags <= set(bash("load", "timm:resnet18", "--weights", ""))
    assert bash("load", "timm:resnet18(num_classes=3)", "--weights", "a2") == [
        tag for tag in sorted(tags) if tag.startswith("a2")
    ]
    assert "IMAGENET1K_V1" not in bash("load", "timm:resnet18.a1_in1k", "--weights", "")
    assert bash("load", "timm:no_such_model", "--weights", "a") == []


def test_models_are_builders_and_files(bash: Bash, folder: Path) -> None:
    torch.save(torch.nn.Linear(2, 3).state_dict(), "resonance.pth")
    (folder / "results").mkdir()
    (folder / "results" / "one.safetensors").touch()
    (folder / "readme.txt").touch()
    assert {"resnet18", "resonance.pth", "results/"} <= set(bash("summary", "res"))
    assert "readme.txt" not in bash("summary", "re")
    assert bash("summary", "results/") == ["results/one.safetensors"]
    assert bash("params", "-m", "alexn") == ["alexnet"]
    assert bash("load", "best.pth", "--arch", "nets") == ["nets.py"]
    assert bash("save", "ou") == []  # then bash completes names of files itself


def test_paths_of_the_working_recipe(bash: Bash, cli: Cli) -> None:
    cli("load", "alexnet")
    assert bash("freeze", "fea") == ["features", *(f"features.{number}" for number in range(13))]
    assert bash("freeze", "features", "classifier.6.") == ["classifier.6.weight", "classifier.6.bias"]
    assert bash("replace", "classifier.6") == ["classifier.6"]
    assert bash("modules", "-s", "avg") == ["avgpool"]
    assert bash("freeze", ".", "--except", "avg") == ["avgpool"]
    cli("replace", "classifier.6", "Linear(_,10)")
    assert bash("freeze", "avg") == ["avgpool"]


def test_paths_of_the_model_that_is_named(bash: Bash, cli: Cli) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 3)).state_dict(), "bare.pth")
    assert bash("freeze", "-m", "bare.pth", "0") == ["0", "0.weight", "0.bias"]
    assert bash("freeze", "0.w", MODELCLI_MODEL="bare.pth") == ["0.weight"]
    assert bash("modules", "bare.pth", "-s", "0.b") == ["0.bias"]
    cli("summary", "resnet18")
    assert bash("modules", "resnet18", "-s", "layer1") == ["layer1", "layer1.0", "layer1.1"]
    assert bash("freeze", "-m", "resnet18", "layer") == ["layer1", "layer2", "layer3", "layer4"]


def test_classes_schemes_and_dtypes(bash: Bash) -> None:
    assert "Linear" in bash("replace", "x", "Lin")
    assert bash("replace", "x", "Linear", "Lin") == []
    assert bash("init", "0", "xav") == ["xavier_uniform", "xavier_normal"]
    assert bash("init", "xav") == []  # the first word is a target
    assert bash("init", "0", "ones", "--bias", "def") == ["default"]
    assert bash("cast", "0", "bf") == ["bfloat16"]


@pytest.fixture
def files(cli: Cli) -> None:
    """Create two bare files, a training checkpoint, and a cache entry of a builder."""
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 3)).state_dict(), "a.pth")
    torch.save({"layer.weight": torch.zeros(2, 3)}, "b.pth")
    state = {"0.weight": torch.zeros(2, 3)}
    training = {"epoch": 3, "model": state, "ema": state, "optimizer": {"state": {0: {"step": torch.ones(())}}}}
    torch.save(training | {"teacher": {"net": {"9.weight": torch.zeros(1)}}}, "train.pth")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("option", ["--frozen", "--trainable", "--has", "--absent", "--except"])
def test_check_completes_the_paths_of_its_model(bash: Bash, option: str) -> None:
    assert bash("check", "a.pth", option, "0.") == ["0.weight", "0.bias"]
    assert bash("check", "--finite", "a.pth", option, "0.w") == ["0.weight"]


def test_check_completes_dtypes_and_models(bash: Bash) -> None:
    assert {"float16", "float32", "float64"} <= set(bash("check", "m.pth", "--dtype", "flo"))
    assert bash("check", "m.pth", "--same-as", "ale") == ["alexnet"]


@pytest.mark.usefixtures("files")
def test_diff_completes_the_paths_of_both_models(bash: Bash) -> None:
    assert bash("diff", "a.pth", "b.pth", "-s", "lay") == ["layer", "layer.weight"]
    assert bash("diff", "a.pth", "b.pth", "--except", "0.") == ["0.weight", "0.bias"]
    assert bash("diff", "a.pth", "missing.pth", "-s", "0.w") == ["0.weight"]
    assert "resnet18" in bash("diff", "a.pth", "b.pth", "--arch", "res")
    assert bash("diff", "a.pth", "b.pth", "--weights", "DEF") == ["DEFAULT"]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "words",
    [
        ("params", "train.pth"),
        ("load", "train.pth"),
        ("check", "train.pth"),
        ("hash", "train.pth"),
        ("identify", "train.pth"),
        ("freeze", "0", "-m", "train.pth"),
        ("diff", "a.pth", "train.pth"),
    ],
)
def test_keys_are_the_state_dicts_of_the_training_checkpoint(bash: Bash, words: tuple[str, ...]) -> None:
    assert bash(*words, "--key", "") == ["model", "ema", "teacher.net"]
    assert bash(*words, "--key", "e") == ["ema"]


@pytest.mark.usefixtures("files")
def test_paths_are_those_of_the_state_dict_that_key_names(bash: Bash) -> None:
    assert bash("params", "train.pth", "--key", "teacher.net", "-s", "9.") == ["9.weight"]
    assert bash("diff", "a.pth", "train.pth", "--key", "model", "--key", "ema", "-s", "0.w") == ["0.weight"]
    assert bash("params", "a.pth", "--key", "") == []  # nothing but a state dict


@pytest.mark.usefixtures("files")
def test_options_with_an_equals_sign(bash: Bash) -> None:
    """Bash splits words at `=` and `:`."""
    assert bash("freeze", "--model", "=", "ale") == ["alexnet"]
    assert "resnet18" in bash("load", "r18.pth", "--arch", "=", "res")
    assert "resnet18" in bash("load", "r18.pth", "--arch", "=")
    assert bash("load", "r18.pth", "--arch", "=", "resnet18", "--weights", "=", "DEF") == ["DEFAULT"]
    assert bash("freeze", "--model", "=", "a.pth", "0.w") == ["0.weight"]
    assert bash("freeze", "0", "--except", "=", "0.w", "-m", "a.pth") == ["a.pth"]
    assert bash("params", "train.pth", "--key", "=", "em") == ["ema"]
    assert bash("freeze", "-m", "nets.py", ":", "a") == []
    assert bash("check", "a.pth", "--has", "0", ":", "Linear", "--frozen", "0.w") == ["0.weight"]


KEYED = [
    ("check a.pth --frozen 0.w", "check a.pth --frozen 0.weight "),
    ("check a.pth --same-as ale", "check a.pth --same-as alexnet "),
    ("freeze --model=ale", "freeze --model=alexnet "),
    ("diff a.pth b.pth -s layer.w", "diff a.pth b.pth -s layer.weight "),
    ("params train.pth --key e", "params train.pth --key ema "),
]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("typed", "expected"), KEYED)
def test_a_key_press_in_an_interactive_bash(bash: Bash, folder: Path, typed: str, expected: str) -> None:
    """Pressing TAB in an interactive bash changes the line as expected."""
    pty = pytest.importorskip("pty")
    (folder / "completion.sh").write_text(bash.script)
    (folder / "rc").write_text(
        ". ./completion.sh\nshow() { printf '<%s>\\n' \"$READLINE_LINE\"; READLINE_LINE=; }\n"
        "bind -x '\"\\C-g\": show' || echo no readline\necho started\n"
    )
    path = f"{bash.bin}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": path, "TERM": "dumb", "PS1": "$ "}
    number, terminal = pty.fork()
    if number == 0:
        os.execvpe("bash", ["bash", "--noprofile", "--rcfile", "rc", "-i"], environment)
    try:
        said = _read_until(terminal, "started")
        if "no readline" in said:
            pytest.skip("bash without readline")
        os.write(terminal, f"modelcli {typed}\t\x07".encode())
        assert f"<modelcli {expected}>" in _read_until(terminal, ">")
    finally:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        os.close(terminal)


def _read_until(terminal: int, text: str) -> str:
    said = ""
    while text not in said:
        ready, _, _ = select.select([terminal], [], [], 30)
        assert ready, f"nothing more after {said!r}"
        said += os.read(terminal, 4096).decode()
    return said


def test_without_completions_nothing_is_printed(bash: Bash, folder: Path) -> None:
    assert bash("freeze", "-m", "alexnet", "fea") == []  # not kept yet
    assert bash("freeze", "-m", "missing.pth", "fea") == []
    (folder / "modelcli.toml").write_text("nonsense = [")
    assert bash("freeze", "fea") == []
    (folder / "broken.pth").write_bytes(b"PK\x03\x04 broken")
    assert bash("freeze", "-m", "broken.pth", "fea") == []


def test_no_code_of_a_reference_runs_and_torch_is_not_imported(bash: Bash, cli: Cli, folder: Path) -> None:
    """Completion never runs the code of a reference, and it does not import torch."""
    (folder / "own.py").write_text("open('ran', 'w')\nfrom nets import Net\n")
    (folder / "modelcli.toml").write_text('model = "own.py:Net"\n')
    assert bash("freeze", "con") == []
    assert bash("freeze", "con", MODELCLI_MODEL="own.py:Net()") == []
    assert not (folder / "ran").exists()
    cli("load", "alexnet", "--force")
    assert bash("freeze", "feat")
    assert bash("summary", "alex")
    assert bash("replace", "classifier.6", "Linear")
    assert bash("load", "alexnet", "--weights", "D") == ["DEFAULT"]
    assert "modelcli.cli.completing" in bash.imported
    assert bash.imported.isdisjoint({"torch", "torchvision", "numpy", "safetensors", "torchinfo"})


def test_completion_takes_less_than_0_3_seconds(bash: Bash, cli: Cli, folder: Path) -> None:
    """The limit is on processor time, because the machine may be busy."""
    import resource

    cli("load", "alexnet")
    words = {"COMP_WORDS": "modelcli\nfreeze\nfea", "COMP_CWORD": "2", "_MODELCLI_COMPLETE": "complete_bash"}
    environment = os.environ | words | {"PYTHONPATH": os.pathsep.join(sys.path)}
    taken: list[float] = []
    while not taken or (min(taken) >= 0.3 and len(taken) < 12):  # other processes may slow a run down
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "modelcli"], env=environment, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 0.3


def test_completion_is_installed_by_one_command(bash: Bash, folder: Path) -> None:
    told = bash.run("modelcli --install-completion; true", HOME=str(folder)).stdout
    assert "bash completion installed in" in told
    assert (folder / ".bash_completions" / "modelcli.sh").read_text().strip() == bash.script.strip()
    assert "modelcli.sh" in (folder / ".bashrc").read_text()


@pytest.mark.parametrize(
    ("shell", "settings", "expected"),
    [
        ("zsh", {}, "_arguments '*: :((\"avgpool\"))'\n"),
        ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}, "avgpool\n"),
    ],
)
def test_other_shells(cli: Cli, folder: Path, shell: str, settings: dict[str, str], expected: str) -> None:
    cli("load", "alexnet")
    asked = {"_MODELCLI_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "modelcli freeze avg"} | settings
    environment = os.environ | asked | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "modelcli"], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (expected, "")
    script = os.environ | {"_MODELCLI_COMPLETE": f"source_{shell}", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "modelcli"], env=script, capture_output=True, text=True)
    assert "_MODELCLI_COMPLETE=complete_" in done.stdout
