"""Files that lie, or that would run something: one message and an exit code, in little time and memory, nothing run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import hostile

CORPUS = hostile.every()
SECONDS, MEGABYTES = 1.0, 200


def commands(item: hostile.Hostile) -> tuple[str, ...]:
    """What a file is looked at with: one command reads as much as the other, and shows other names of it."""
    return ("params",) if item.code else ("params", "modules")


#: A process without torch that looks at each file in a child of its own, and tells what became of it.
LOOKS = """
import json, os, sys
from modelcli.cli import main
import modelcli.session, modelcli.render.documents, modelcli.render.writers, modelcli.checkpoints, modelcli.selectors
for line in sys.stdin:
    words, out = json.loads(line)
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(out, "w", encoding="utf-8")
        code = main(words)
        print("torch is there" if "torch" in sys.modules else "", flush=True)
        os._exit(code)
    _, status, usage = os.wait4(child, 0)
    told = {"code": os.waitstatus_to_exitcode(status), "seconds": usage.ru_utime + usage.ru_stime}
    print(json.dumps(told | {"kilobytes": usage.ru_maxrss}), flush=True)
"""


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What became of a look at every file, by its name and the command."""
    folder = tmp_path_factory.mktemp("hostile")
    asked = []
    for number, item in enumerate(CORPUS):
        suffix = ".index.json" if item.name.startswith("index ") else ".pth"
        path = folder / f"{number}{suffix}"
        path.write_bytes(item.data)
        asked += [(item.name, command, path, folder / f"{number}.{command}") for command in commands(item)]
    lines = [json.dumps([[command, str(path)], str(out)]) for _, command, path, out in asked]
    done = subprocess.run(
        [sys.executable, "-c", LOOKS], input="\n".join(lines), capture_output=True, text=True, check=True, cwd=folder
    )
    told = map(json.loads, done.stdout.splitlines())
    found = {
        (name, command): {**one, "text": out.read_text(encoding="utf-8")}
        for (name, command, _, out), one in zip(asked, told, strict=True)
    }
    found["", "marker"] = {"there": (folder / hostile.MARKER).exists()}
    return found


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len(CORPUS) >= 100
    assert len({item.name for item in CORPUS}) == len(CORPUS)


@pytest.mark.skipif(os.name == "nt", reason="children are forked")
@pytest.mark.parametrize(
    ("item", "command"),
    [pytest.param(item, command, id=f"{item.name}: {command}") for item in CORPUS for command in commands(item)],
)
def test_one_message_and_nothing_run(looks: Any, item: hostile.Hostile, command: str) -> None:
    look = looks[item.name, command]
    text = look["text"]
    assert look["code"] == item.code, text[:500]
    assert "Traceback" not in text
    assert "fault in modelcli" not in text
    assert "torch is there" not in text
    assert "\x1b" not in text
    assert len(text) < 4000 or not item.code
    if item.code:
        assert text.startswith("error: ")
    if item.code or command == "params":
        assert item.says in text
    assert look["seconds"] < SECONDS
    assert look["kilobytes"] < MEGABYTES * 1000


@pytest.mark.skipif(os.name == "nt", reason="children are forked")
def test_no_payload_ran(looks: Any) -> None:
    assert looks["", "marker"] == {"there": False}


def test_a_payload_would_run(tmp_path: Path) -> None:
    """With Python's own pickle it does: the markers mark."""
    code = f"import pickle; pickle.loads(b'\\x80\\x02' + {hostile.PAYLOADS['os.system']!r} + b'.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / hostile.MARKER).exists()
