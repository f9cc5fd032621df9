"""The README is the manual: its examples run and print what it shows, and it mentions every command and option.

All `console` blocks run in order in one folder, and so do the Python blocks between them and the command lines of the
examples in docs/ci.md. Files that a reader would already have are created first.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
import typer
import yaml

from modelcli import edits
from modelcli.cli.app import app
from tests.cli import readme_tables
from tests.cli.test_help import commands
from tests.conftest import Cli

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
JSON_PAGE = (REPOSITORY / "docs" / "json.md").read_text(encoding="utf-8")
#: The examples of these pages run in this order in one folder.
EXAMPLE_PAGES = ("README.md", "docs/ci.md")
PAGES = sorted(page.relative_to(REPOSITORY) for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
EXAMPLES = Path(__file__).parents[2] / "examples"
#: The exit codes of examples that, as the README says, fail.
CODES = {"modelcli load runs/best.pth --arch alexnet": 1, "modelcli diff runs/best.pth runs/tuesday.pth": 1}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the page and line where it begins."""

    language: str
    text: str
    position: str


def blocks() -> Iterator[Block]:
    for page in EXAMPLE_PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(found[1], found[2], f"{page}:{text.count(chr(10), 0, found.start()) + 1}")


def steps(text: str) -> Iterator[tuple[str, str]]:
    """Yield the command lines of a console block, each with its output, without the comments before them."""
    text = re.sub(r"^# .*\n(?=\$ )", "", text, flags=re.MULTILINE)
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        command = [lines.pop(0)]
        while command[-1].endswith("\\"):
            command[-1] = command[-1].removesuffix("\\")
            command.append(lines.pop(0))
        yield " ".join(line.strip() for line in command), "\n".join(lines).strip()


def flat(text: str) -> str:
    """Return a text with single spaces between words, because the README wraps long lines."""
    return " ".join(text.split())


@pytest.fixture
def world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader: it has a file of classes, and torchvision's cache has the pretrained weights."""
    monkeypatch.delitem(sys.modules, "nets", raising=False)  # another test may have imported a module of this name
    (folder / "nets.py").write_bytes((EXAMPLES / "nets.py").read_bytes())
    downloads = Path(os.environ["TORCH_HOME"], "hub", "checkpoints")
    downloads.mkdir(parents=True)
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, downloads / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name)
    save_language_models()
    return folder


def save_dino() -> None:
    """Save what DINO writes while it trains a ResNet-50, without its optimizer, into `dino.pth`."""
    backbone = {name: value for name, value in torchvision.models.resnet50().state_dict().items() if name[:3] != "fc."}
    teacher = {f"backbone.{name}": value for name, value in backbone.items()} | {"head.mlp.0.weight": torch.ones(8, 8)}
    student = {f"module.{name}": value for name, value in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 99}, "dino.pth")


def save_language_models() -> None:
    """Save small models of transformers into `bert/`, `llama/` and `gpt2/`."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60}
    bert = transformers.BertConfig(num_hidden_layers=4, max_position_embeddings=40, **size)
    transformers.BertForSequenceClassification(bert).save_pretrained("bert")
    llama = transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=64, **size)
    transformers.LlamaForCausalLM(llama).save_pretrained("llama")
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=64)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained("gpt2")


def test_every_example_runs_and_prints_what_the_readme_says(cli: Cli, world: Path) -> None:
    cli("save", "own.pth", "-m", "nets.py:Net")
    save_dino()
    ran = 0
    for block in blocks():
        if block.language == "python":
            exec(block.text, {"__name__": "readme"})
        for command, shown in steps(block.text) if block.language == "console" else ():
            words = shlex.split(command, comments=True)
            code = 2 if shown.startswith("error:") else CODES.get(shlex.join(words), 0)
            result = cli(*words[1:], code=code)
            said = flat(result.out + result.err)
            assert flat(shown) in (said, flat(result.out), flat(result.err), ""), f"{block.position}: {command}"
            ran += 1
        for command in ci_lines(block.text) if block.language == "yaml" else ():
            words = shlex.split(command.partition(" >")[0])
            assert cli(*words[1:]).err == ""
            ran += 1
    text = "".join((REPOSITORY / page).read_text(encoding="utf-8") for page in EXAMPLE_PAGES)
    assert ran == sum(map(text.count, ("\n$ modelcli ", "run: modelcli ", "    - modelcli "))) > 40


def ci_lines(text: str) -> Iterator[str]:
    """Yield the command lines of modelcli in a GitHub workflow or a GitLab pipeline."""
    (_, jobs), *_ = [item for item in yaml.safe_load(text).items() if item[0] in ("jobs", "checkpoint")]
    for job in jobs.values() if "script" not in jobs else (jobs,):
        lines = [*job.get("script", ()), *(step.get("run", "") for step in job.get("steps", ()))]
        assert any(line.startswith("modelcli check") for line in lines)
        yield from (line for line in lines if line.startswith("modelcli "))


def test_recipes_in_the_readme_are_valid(cli: Cli, world: Path) -> None:
    (recipe,) = [block.text for block in blocks() if block.language == "toml"]
    (world / "modelcli.toml").write_text(recipe)
    assert cli("log", "--json").json["edits"] == ["replace classifier.6 Linear(4096,10)", "freeze features"]


@pytest.mark.parametrize("name", list(commands()))
def test_every_command_and_option_is_in_the_reference(name: str) -> None:
    reference = README.partition("\n## Reference\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[0] for line in reference.splitlines() if line.startswith("| ")]
    assert any(re.search(rf"`{name}[ `]", cell) for cell in cells)
    group: Any = typer.main.get_command(app)
    for word in name.split():
        group = group.commands[word]
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", reference))
    for option in group.params:
        if option.param_type_name == "option":
            assert {*option.opts, *option.secondary_opts} <= known, f"{name} {'/'.join(option.opts)}"


def test_the_tables_of_the_edits_are_made_from_their_declarations() -> None:
    assert README.count("made by `make readme`") == 2
    assert readme_tables.with_tables(README) == README, "make readme writes them anew"
    for name in edits.own_names():
        assert f"\n| `{name} " in README


def test_the_options_of_the_program_are_in_the_readme() -> None:
    group: Any = typer.main.get_command(app)
    names = {name for option in group.params for name in option.opts}
    assert names > {"--version", "--install-completion"}
    assert all(f"{name}`" in README or f"{name}\n" in README for name in names)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_of_a_page_is_valid(page: Path) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (REPOSITORY / page).parent / target if target else REPOSITORY / page
        assert file.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in known, f"{page}: {link}"


DOCUMENTS = {
    "summary": ("summary", "Linear(3,2)", "--input-size", "1,3"),
    "params": ("params", "Linear(3,2)", "--stats", "--values"),
    "modules": ("modules", "Linear(3,2)"),
    "report": ("report", "Sequential(Linear(2,2))", "--stats", "--against", "Linear(3,2)"),
    "edits": ("freeze", "weight", "-m", "Linear(3,2)"),
    "load": ("load", "small.pth", "--arch", "Linear(2,2)", "--dry-run"),
    "save": ("save", "out.pth", "-m", "Linear(3,2)"),
    "log": ("log",),
    "undo": ("undo",),
    "script": ("script", "-e", "freeze .", "-m", "Linear(3,2)"),
    "list": ("list", "alexnet"),
    "cache": ("cache", "path"),
    "diff": ("diff", "Linear(3,2)", "Sequential(Linear(2,2))"),
    "check": ("check", "Linear(3,2)", "--max-params", "8"),
    "hash": ("hash", "Linear(3,2)"),
    "memory": ("memory", "Linear(3,2)", "--input-size", "1,3"),
    "identify": ("identify", "bare.pth"),
    "errors": ("params", "nowhere.pth"),
}


#: More commands, for keys that not every document has.
MORE_DOCUMENTS = [
    ("edits", ("cast", ".", "float16", "-m", "Linear(3,2)")),
    ("save", ("save", "out.pth", "-m", "Linear(3,2)", "--dry-run")),
    ("params", ("params", "own.py:Net")),
    ("params", ("params", "sparse.pth")),
    ("hash", ("hash", "sparse.pth", "--tree")),
]


OWN = """
import torch
class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 3)
        self.register_buffer("steps", torch.zeros(3), persistent=False)
"""
#: The keys inside lists that are empty in these documents.
EMPTY = {"identify": {f"matches.mismatched.{name}" for name in ("name", "expected", "found")}}
TOTALS = ("params", "trainable_params", "non_trainable_params", "buffers", "param_bytes", "buffer_bytes")


def keys_of(value: Any, above: str = "") -> set[str]:
    """Return every key in a document, with the keys above it: `tensors.stats.min`."""
    if isinstance(value, list):
        return {key for item in value for key in keys_of(item, above)}
    if not isinstance(value, dict):
        return set()
    return {f"{above}{key}" for key in value} | {
        below for key, item in value.items() for below in keys_of(item, f"{above}{key}.")
    }


def promised_in(text: str) -> tuple[set[str], set[str]]:
    """Return the keys of a document on the page, and those of them that not every document has."""
    keys, sometimes, path, key, before = set(), set(), [], "", ""
    for token, remark in re.findall(r'("[^"]*"|[{}\[\],:|])( \()?', text):
        if token == "{":
            path.append(key)
        elif token == "}":
            path.pop()
            if not path:
                break
        elif token.startswith('"') and before in ("{", ","):
            key = token.strip('"')
            keys.add(".".join([*path[1:], key]))
            if remark:
                sometimes.add(".".join([*path[1:], key]))
        before = token
    model = {"model.reference", "model.class"} if "model" in keys else set()
    totals = {name for name in ("totals", "totals_before", "totals_after") if name in keys}
    bare = totals - {key.partition(".")[0] for key in keys if "." in key}
    sometimes |= {key for key in keys if key.rpartition(".")[0] in sometimes}
    return keys | model | {f"{name}.{count}" for name in bare for count in TOTALS}, sometimes


@pytest.mark.parametrize(("kind", "words"), [*DOCUMENTS.items(), *MORE_DOCUMENTS])
def test_the_json_documents_have_the_keys_of_their_page(
    kind: str, words: tuple[str, ...], cli: Cli, world: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "identify":
        monkeypatch.setenv("MODELCLI_CACHE", str(warm_cache))
    text = JSON_PAGE.partition("```text\n")[2].partition("```")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\w)", text.strip()):
        names, _, document = entry.partition("{")
        found |= {name.strip(): document for name in names.split(",")}
    assert set(DOCUMENTS) == found.keys()
    promised, sometimes = promised_in("{" + found[kind])
    torch.save(torch.nn.Linear(3, 2).state_dict(), "small.pth")
    torch.save(torchvision.models.alexnet(num_classes=10).state_dict(), "bare.pth")
    torch.save({"w": torch.eye(3).to_sparse()}, "sparse.pth")
    Path("own.py").write_text(OWN)
    Path("modelcli.toml").write_text('model = "Linear(3,2)"\nedits = ["freeze weight"]\n')
    code = {"load": 1, "diff": 1, "errors": 2}.get(kind, 0)
    result = cli(*words, "--json", code=code)
    made = keys_of(json.loads(result.err if kind == "errors" else result.out)) - {"notes"}
    assert promised - sometimes - EMPTY.get(kind, set()) <= made <= promised
