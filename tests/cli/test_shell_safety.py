"""No shell runs a name from a file: completion in real shells on a pseudo-terminal, and the output of commands.

The tests of a missing bash, zsh or fish are skipped; in CI they fail.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from html import unescape
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from typer import _completion_shared

from modelcli.cli import shells
from modelcli.language.quoting import quoted
from modelcli.render.views import Column, View
from modelcli.render.writers import safe, to_csv
from tests.conftest import Cli

SHELLS = ("bash", "zsh", "fish")

#: Commands that leave a file behind if any shell ever runs them.
HOSTILE = (
    "$(touch PWNED)",
    "`touch PWNED`",
    "\\$(touch PWNED)",
    "a;touch PWNED;b",
    "a&&touch PWNED",
    "a|touch PWNED",
    "'$(touch PWNED)'",
    '"$(touch PWNED)"',
    "a'b\"c`touch PWNED`",
    "\\`touch PWNED\\`",
    "x\\",
    "~root",
    "~",
    "!!",
    "a!b",
    "*",
    "a*?[b]",
    "{a,b}",
    "#c",
    "=ls",
    "a b  c",
    "é ü",
    "<(touch PWNED)",
    "(touch PWNED)",
    "%d%s",
    "^a^b",
    "a$HOME",
    "${HOME}",
    "$",
)

RC = {
    "bash": """
modelcli() {{ printf '%s\\0' "$@" >> {out}; printf '\\0\\0' >> {out}; }}
PS1='> '; set -o histexpand; shopt -s extglob
show() {{ printf '%s' "$READLINE_LINE" > {line}.new; mv {line}.new {line}; }}
bind -x '"\\C-g": show'
bind 'set bell-style none'
bind 'set completion-query-items 0'; bind 'set page-completions off'
""",
    "zsh": """
autoload -Uz compinit; compinit -u -d {home}/dump
modelcli() {{ printf '%s\\0' "$@" >> {out}; printf '\\0\\0' >> {out}; }}
PS1='> '; setopt banghist extendedglob no_beep; unset zle_bracketed_paste
LISTMAX=10000
show() {{ print -rn -- "$BUFFER" > {line}.new; mv {line}.new {line}; }}
zle -N show; bindkey '^G' show
""",
    "fish": """
function modelcli
    printf '%s\\0' $argv >> {out}; printf '\\0\\0' >> {out}
end
set -g fish_greeting; set -g fish_autosuggestion_enabled 0
function fish_prompt; echo '> '; end
bind \\cg 'commandline > {line}.new; mv {line}.new {line}'
""",
}
START = {
    "bash": ["bash", "--noprofile", "--rcfile", "{rc}", "-i"],
    "zsh": ["zsh", "-d", "-i"],
    "fish": ["fish", "-i"],
}
#: Typer's scripts, as earlier versions installed them.
TYPER = {
    shell: script
    % {"complete_func": "_modelcli_completion", "prog_name": "modelcli", "autocomplete_var": "_MODELCLI_COMPLETE"}
    for shell, script in _completion_shared._completion_scripts.items()
    if shell in SHELLS
}


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a shell with a home folder of its own."""
    return {
        "HOME": str(home),
        "ZDOTDIR": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "XDG_DATA_HOME": str(home),
        "TERM": "xterm",
        "LANG": "C.UTF-8",
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MODELCLI_CACHE": str(home / "cache"),
    }


class Terminal:
    """An interactive shell. There, `modelcli` completes with the real program and, when run, records its arguments."""

    def __init__(self, shell: str, home: Path, folder: Path, program: str, script: str) -> None:
        self.answers: Answers | None = None
        self.shell, self.is_typers_bash = shell, script == TYPER["bash"]
        self.out, self.line_file = home / "out", home / "line"
        (home / "bin").mkdir(parents=True, exist_ok=True)
        self.out.touch()
        executable = home / "bin" / "modelcli"
        executable.write_text(f"#!/bin/sh\n{program}\n")
        executable.chmod(0o755)
        rc = {"bash": "rc", "zsh": ".zshrc", "fish": ".config/fish/config.fish"}[shell]
        (home / rc).parent.mkdir(parents=True, exist_ok=True)
        (home / "script").write_text(script)
        text = RC[shell].format(out=self.out, line=self.line_file, home=home)
        (home / rc).write_text(text + f"\nsource {home / 'script'}\necho 'sta''rted'\n")
        import fcntl
        import pty
        import termios

        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(folder)
                os.execvpe(shell, [word.format(rc=home / rc) for word in START[shell]], environment(home))
            finally:
                os._exit(127)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 250, 0, 0))
        self.said = ""
        self.wait(lambda: "started" in self.said)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait(self, until, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, f"{self.shell} said {self.said[-700:]!r}"
            ready, _, _ = select.select([self.terminal], [], [], 0.002)
            if ready:
                with contextlib.suppress(OSError):
                    self.said += os.read(self.terminal, 65536).decode(errors="replace")

    def line(self, typed: str) -> str:
        """Type keys. Returns the command line afterwards."""
        self.line_file.unlink(missing_ok=True)
        self.type(f"{typed}\x07")
        self.wait(self.line_file.exists)
        return self.line_file.read_text().removesuffix("\n")

    def clear(self) -> None:
        self.line("\x05\x15")

    def run(self, typed: str) -> list[str]:
        """Type keys and Enter. Returns the arguments that the command received."""
        before = self.out.stat().st_size
        self.type(f"{typed}\r")
        self.wait(lambda: self.out.read_bytes()[before:].endswith(b"\0\0"), 10)
        return self.out.read_bytes()[before:].decode().split("\0")[:-3]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.terminal)


class Answers:
    """Answers the requests of completion scripts from this process, instead of starting a program for each key press.

    If `word` is set, it is the only completion.
    """

    PROGRAM = (
        'exec 3>{requests}; printf "%s\\0" "$_MODELCLI_COMPLETE" "$COMP_WORDS" "$COMP_CWORD" "$_TYPER_COMPLETE_ARGS" '
        '"$_TYPER_COMPLETE_FISH_ACTION" "$@" >&3; exec 3>&-; read -r code < {codes}; cat {replies}; exit $code'
    )

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = {name: folder / name for name in ("requests", "codes", "replies")}
        for path in self.paths.values():
            os.mkfifo(path)
        self.program = self.PROGRAM.format(**self.paths)
        self.word: str | None = None
        self.written: list[str] = []
        self.gave = False
        self.real = shells._offered
        monkeypatch.setattr(shells, "_offered", self._offered)
        monkeypatch.setattr(shells, "_write", self.written.append)
        for name in NAMES:
            monkeypatch.setenv(name, "")
        threading.Thread(target=self._serve, daemon=True).start()

    def _offered(self, words: Sequence[str], incomplete: str) -> list[tuple[str, str]]:
        if self.word is None:
            return self.real(words, incomplete)
        return [(self.word, "")] if self.word.startswith(incomplete) else []

    def _serve(self) -> None:
        while True:
            asked = self.paths["requests"].read_bytes().decode().split("\0")[:-1]
            os.environ.update(zip(NAMES, asked[1:5], strict=True))
            self.written.clear()
            code = shells.answer(asked[0], asked[5:])
            self.paths["codes"].write_text(f"{code}\n")
            self.gave = "".join(self.written).strip() not in ("", "_files")
            self.paths["replies"].write_text("".join(self.written))


#: What Typer's scripts pass in the environment.
NAMES = ("COMP_WORDS", "COMP_CWORD", "_TYPER_COMPLETE_ARGS", "_TYPER_COMPLETE_FISH_ACTION")


# --- the real program ------------------------------------------------------------------------------------------------


def needed(shell: str) -> None:
    """Skip the test if a shell is missing; in CI, fail it."""
    if os.name != "nt" and shutil.which(shell):
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"no {shell}: .ci/run installs it")
    pytest.skip(f"no {shell}")


@pytest.fixture(scope="module", params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    needed(request.param)
    return request.param


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files with hostile names, and checkpoints with hostile names of tensors and state dicts."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in [*HOSTILE, "line\nbreak", "es\x1bcape", "-o"]:
        (folder / f"{name}.pth").touch()
    tensors = {
        name: torch.zeros(1) for name in [*HOSTILE, "line\n$(touch PWNED)", "bell\x07", "\u202eturned", "--force"]
    }
    torch.save({"feature.weight": torch.zeros(1)} | tensors, folder / "t.pth")
    torch.save({name: {"w": torch.zeros(1)} for name in HOSTILE}, folder / "keyed.pth")
    (folder / "attack").mkdir()
    torch.save({"$(touch PWNED).weight": torch.zeros(1)}, folder / "attack" / "m.pth")
    (folder / "attack" / "modelcli.toml").write_text('model = "m.pth"\n')
    torch.save({"*.weight": torch.zeros(1)}, folder / "attack" / "star.pth")
    return folder


@pytest.fixture(scope="module", params=["own", "typer"])
def terminal(
    request: pytest.FixtureRequest, shell: str, hostile: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Terminal]:
    script = (shells.SCRIPTS if request.param == "own" else TYPER)[shell]
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MODELCLI_CACHE", str(home / "cache"))
        monkeypatch.delenv("MODELCLI_MODEL", raising=False)
        monkeypatch.chdir(hostile)
        answers = Answers(home, monkeypatch)
        terminal = Terminal(shell, home, hostile, answers.program, script)
        terminal.answers = answers
        yield terminal
        terminal.close()


@pytest.fixture(autouse=True)
def _in_the_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "terminal" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("hostile"))


#: The typed text, and the arguments after TAB and Enter. In bash, Typer's own script may offer nothing.
COMPLETED = [
    ("freeze -m t.pth feat", ["freeze", "-m", "t.pth", "feature"]),
    ("freeze -m t.pth feature.", ["freeze", "-m", "t.pth", "feature.weight"]),
    ("freeze --model=t.p", ["freeze", "--model=t.pth"]),
    ("summary 'a b", ["summary", "a b  c.pth"]),
    ("summary a\\ ", ["summary", "a b  c.pth"]),
    ('summary "é', ["summary", "é ü.pth"]),
    ("freeze -m t.pth \\$\\(", ["freeze", "-m", "t.pth", "$(touch PWNED)"]),
    ("freeze -m t.pth 'a;", ["freeze", "-m", "t.pth", "a;touch PWNED;b"]),
    ("freeze -m t.pth \\`", ["freeze", "-m", "t.pth", "`touch PWNED`"]),
    ("params keyed.pth --key a\\&", ["params", "keyed.pth", "--key", "a&&touch PWNED"]),
    ("params keyed.pth --key=\\<", ["params", "keyed.pth", "--key=<(touch PWNED)"]),
]


@pytest.mark.parametrize(("typed", "words"), COMPLETED)
def test_a_completed_word_reaches_the_command_as_one_argument(
    terminal: Terminal, hostile: Path, typed: str, words: list[str]
) -> None:
    line = terminal.line(f"modelcli {typed}\t")
    assert line != f"modelcli {typed}"
    got = terminal.run("")
    assert not (hostile / "PWNED").exists()
    if terminal.is_typers_bash and any("PWNED" in word for word in words):
        assert len(got) == len(words)  # not offered: the name of a file, by bash's own completion
    else:
        assert got == words


@pytest.mark.parametrize(
    "typed", ["summary ", "summary a", "freeze -m t.pth ", "freeze -m t.pth $", "freeze -m t.pth '", "summary \\"]
)
def test_tab_runs_nothing_and_offers_no_control_characters(terminal: Terminal, hostile: Path, typed: str) -> None:
    """TAB lists all completions and inserts their common beginning."""
    terminal.said = ""
    line = terminal.line(f"modelcli {typed}\t\t")
    assert line.startswith(f"modelcli {typed}".rstrip(" \\"))
    assert not (hostile / "PWNED").exists()
    assert not {"bell\x07", "es\x1bcape", "\u202eturned"} & set(terminal.said.split())
    assert "PWNED" in terminal.said or typed in ("freeze -m t.pth $", "summary a") or terminal.shell == "bash"
    terminal.clear()


@pytest.mark.parametrize(("typed", "word"), [("freeze ", "$(touch PWNED)"), ("freeze -m star.pth ", "*")])
def test_the_one_word_that_a_folder_offers_is_not_run(
    terminal: Terminal, hostile: Path, typed: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simplest attack: a recipe in the folder names a checkpoint, and TAB completes the name of its only tensor."""
    folder = hostile / "attack"
    monkeypatch.chdir(folder)
    terminal.line("cd attack\r")
    try:
        terminal.line(f"modelcli {typed}\t")
        if terminal.is_typers_bash:  # the quotation mark is open still, or nothing was offered
            terminal.type("'\r")
            terminal.line("\r'\r")
        else:
            assert terminal.run("") == [*typed.split(), word]
        assert not (folder / "PWNED").exists()
    finally:
        terminal.clear()
        terminal.line("cd ..\r")


def test_the_installed_completion_of_the_real_program(shell: str, hostile: Path, tmp_path: Path) -> None:
    """`--install-completion`, a new shell and TAB, without any part of the test suite in between."""
    program = f'exec {shlex.quote(sys.executable)} -m modelcli "$@"'
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "modelcli").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "bin" / "modelcli").chmod(0o755)
    installed = subprocess.run(
        [shell, "-c", "modelcli --install-completion; true"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{shell} completion installed in" in installed.stdout
    rc = tmp_path / {"bash": ".bashrc", "zsh": ".zshrc", "fish": "none"}[shell]
    terminal = Terminal(shell, tmp_path, hostile, program, rc.read_text() if rc.exists() else "")
    try:
        assert terminal.line("modelcli freeze --dry\t") == "modelcli freeze --dry-run "
        terminal.clear()
        terminal.line("modelcli freeze -m t.pth \\$\\(\t")
        assert terminal.run("") == ["freeze", "-m", "t.pth", "$(touch PWNED)"]
        assert not (hostile / "PWNED").exists()
    finally:
        terminal.close()


@pytest.mark.parametrize("shown", SHELLS)
def test_the_script_that_is_shown_is_the_one_that_is_installed(shown: str, tmp_path: Path) -> None:
    asked = environment(tmp_path) | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "modelcli", "--show-completion", shown]
    done = subprocess.run(command, env=asked, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == shells.SCRIPTS[shown].strip()
    source = environment(tmp_path) | {"_MODELCLI_COMPLETE": f"source_{shown}"}
    done = subprocess.run(command[:3], env=source, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == shells.SCRIPTS[shown].strip()


# --- any word --------------------------------------------------------------------------------------------------------


def nasty_words(count: int, seed: int) -> Iterator[str]:
    """Yield words with characters that have a meaning in one of the shells."""
    pieces = [*"$`;&|<>(){}[]*?!~#^%=:@,+\\'\"/. -_abXé中", "$(", "touch X", "\\'", '\\"', "$'", '$"', "!!", "  ", "${"]
    chance = random.Random(seed)
    while count:
        word = "".join(chance.choices(pieces, k=chance.randint(1, 9)))
        if word.strip(" ") and not word.startswith("-"):
            count -= 1
            yield word


def beginnings(word: str, shell: str, chance: random.Random) -> str:
    """Return a beginning of a word as a user may type it: empty, partial, in quotation marks, with backslashes."""
    begin = word[: chance.randint(0, len(word) - 1)]
    # Behind these, shells let one go on with the word, and leave a quotation mark open.
    way = chance.randint(0, 3) if word[-1] not in "/=@:.,-" else 3
    if shell == "fish" and "*" in begin:  # fish ends the word there, quoted or not
        return ""
    if way == 1 and not set(begin) & set("'\\!"):
        return f"'{begin}"
    if way == 2 and not set(begin) & set('"\\$`!'):
        return f'"{begin}'
    if way == 3 and begin.isascii():
        return "".join(char if char.isalnum() else f"\\{char}" for char in begin)
    return ""


@pytest.mark.parametrize("origin", ["own", "typer"])
def test_any_completed_word_reaches_the_command_unchanged(
    shell: str, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers(tmp_path, monkeypatch)
    folder = tmp_path / "folder"
    folder.mkdir()
    script = (shells.SCRIPTS if origin == "own" else TYPER)[shell]
    terminal = Terminal(shell, tmp_path / "home", folder, answers.program, script)
    chance, inserted, count = random.Random(1), 0, int(os.environ.get("SHELL_WORDS", "60"))
    try:
        for word in nasty_words(count, 2):
            answers.word, typed = word, f"modelcli freeze {beginnings(word, shell, chance)}"
            completed = terminal.line(f"{typed}\t").rstrip() != typed.rstrip()
            if answers.gave and completed:
                assert (word, typed, terminal.run("")) == (word, typed, ["freeze", word])
                inserted += 1
            else:  # not offered, or not taken: the shell may complete names of files
                terminal.clear()
    finally:
        terminal.close()
    assert list(folder.iterdir()) == []
    assert inserted > count * (0.9 if origin == "own" else 0.1)


# --- spreadsheets and pages ------------------------------------------------------------------------------------------

FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1", "a;=1+1", 'a,"=1', "=cmd|' /C calc'!A0"]
MARKUP = [
    "a|b",
    "`code`",
    "``a`",
    "<script>alert(1)</script>",
    "<http://evil>",
    "[x](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "[x]: http://evil",
    "*a* **b** _c_ __d__",
    "&lt;b&gt;",
    "a\\|b\\",
    "~~gone~~",
    "running_mean",
]


def test_no_cell_of_a_csv_is_a_formula(cli: Cli, folder: Path) -> None:
    """This includes spreadsheets that split cells at semicolons."""
    torch.save({name: torch.zeros(1) for name in FORMULAS}, "t.pth")
    text = cli("params", "t.pth", "-f", "csv").out
    names = [row["name"] for row in csv.DictReader(io.StringIO(text))]
    assert [name.removeprefix("'").replace(";'", ";") for name in names] == [safe(name) for name in FORMULAS]
    for delimiter in ",;":
        cells = [cell for row in csv.reader(io.StringIO(text), delimiter=delimiter) for cell in row]
        assert not [cell for cell in cells if cell.lstrip(" \"'")[:1] in [*"=+-@\t\r＝"] and cell[:1] != "'"]


def test_numbers_of_a_csv_stay_numbers() -> None:
    view = View(
        {},
        [{"least": -0.5, "change": -3, "shape": [-1, 2]}],
        [Column(key, key) for key in ("least", "change", "shape")],
    )
    assert to_csv(view) == 'least,change,shape\n-0.5,-3,"[-1,2]"\n'


def test_a_markdown_page_shows_names_as_they_are(cli: Cli, folder: Path) -> None:
    """The page is rendered by markdown-it, which Rich depends on."""
    torch.save({name: torch.zeros(1) for name in MARKUP}, "t.pth")
    html = (
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(cli("params", "t.pth", "-f", "markdown").out)
    )
    assert set(re.findall(r"</?(\w+)", html)) == {"table", "thead", "tbody", "tr", "th", "td"}
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>", html)
    assert [unescape(name) for name in rows] == MARKUP


# --- commands that hints and notes show ------------------------------------------------------------------------------


def test_a_quoted_word_is_the_same_in_every_shell(shell: str) -> None:
    words = [*HOSTILE, *nasty_words(500, 3), "layer1.0", "Linear(4, 10)"]
    line = "printf '%s\\0' " + " ".join(map(quoted, words))
    done = subprocess.run([shell, "-c", line], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words
    assert (quoted("layer1.0"), quoted("Linear(4, 10)")) == ("layer1.0", "'Linear(4, 10)'")
    assert quoted("Conv2d(3,8,1,padding_mode='reflect')") == "\"Conv2d(3,8,1,padding_mode='reflect')\""


HOSTILE_NAME = "$(touch PWNED)"


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (("modules", "t.pth", "-s", HOSTILE_NAME), 0, f"-s '{HOSTILE_NAME}.**' shows"),
        (("rename", HOSTILE_NAME, "x", "-m", "t.pth"), 2, f"rename '{HOSTILE_NAME}.**' 'x.**' renames"),
        (("diff", "t.pth", "t.pth", "--except", f"{HOSTILE_NAME}.**"), 2, f"--except '{HOSTILE_NAME}.**' leaves out"),
        (("add", HOSTILE_NAME, "ReLU", "-m", "t.pth", "--arch", "own.py:Net"), 2, f"replace '{HOSTILE_NAME}' puts"),
        (("convert", f"{HOSTILE_NAME}.pth", "b.pth"), 2, f"modelcli save b.pth -m '{HOSTILE_NAME}.pth'"),
    ],
)
def test_a_command_in_a_hint_is_quoted(cli: Cli, folder: Path, words: tuple[str, ...], code: int, shown: str) -> None:
    torch.save({f"{HOSTILE_NAME}.0.weight": torch.zeros(2, 2), f"{HOSTILE_NAME}.0.bias": torch.zeros(2)}, "t.pth")
    (folder / "own.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.add_module({HOSTILE_NAME!r}, nn.Sequential(nn.Linear(2, 2)))\n"
    )
    result = cli(*words, code=code)
    assert shown in result.out + result.err


def test_a_line_of_a_recipe_runs_nothing_when_it_is_copied(cli: Cli, folder: Path) -> None:
    names = ("$(reboot)", "a;reboot", "`reboot`", "a>b", "a|b")
    torch.save({f"{name}.weight": torch.zeros(1) for name in names}, "t.pth")
    cli("load", "t.pth")
    for name in names:
        cli("cast", name, "float16")
    log = cli("log").out
    for name in names:
        assert f"cast '{name}' float16" in log
