"""Only the module of a format contains its suffixes: no other code looks at the ends of file names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelcli
from modelcli.checkpoints import formats

SOURCE = Path(modelcli.__file__).parent
#: All suffixes that the formats declare, in the order of their declarations, each with the package that names it.
OWNERS = {
    suffix: SOURCE.joinpath(*type(format_).__module__.split(".")[1:])
    for format_ in formats.built_in()
    for suffix in (*format_.suffixes, *format_.written_suffixes, *filter(None, [format_.index_pattern.strip("*")]))
}
_NAMES = "|".join(sorted((suffix[1:] for suffix in OWNERS), key=len, reverse=True))
#: A suffix by itself: `.pth`, `*.pth`, `\\.pth`, but not the example of a file in a message: `best.pth`, `IN.pth`.
_BARE = re.compile(rf"(?<![\w)\]])\.(?:{_NAMES})(?!\w)", re.IGNORECASE)
#: The name of a file that ends so.
_FILE = re.compile(rf"\.(?:{_NAMES})(?!\w)", re.IGNORECASE)
#: Words that are suffixes of some files and also have another meaning: a kind of container, a key.
OTHERS = {"tar", "metadata"}
#: Methods that compare a text, or its end, with another text.
_ASKING = {
    *("endswith", "startswith", "removesuffix", "removeprefix", "partition", "rpartition", "with_suffix", "glob"),
    *("rglob", "match", "fullmatch", "search", "compile", "get", "index", "find", "rfind", "count", "split"),
}


def docstrings(tree: ast.AST) -> set[int]:
    """Return the nodes of docstrings."""
    found = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            found.add(id(body[0].value))
    return found


def texts_that_decide(tree: ast.AST) -> set[int]:
    """Return the nodes of texts that are compared with others or searched in others."""
    found: set[int] = set()
    for node in ast.walk(tree):
        asked: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ASKING:
            asked = [*node.args]
        found |= {id(inner) for outer in asked for inner in ast.walk(outer) if isinstance(inner, ast.Constant)}
    return found


def named(path: Path) -> Iterator[str]:
    """Yield the suffixes that a file's code names without declaring them: `line 3: .pth`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told, decide = docstrings(tree), texts_that_decide(tree)
    # The records of an archive have names, too: `data.pkl`.
    reads_archives = path.parent.parent == SOURCE / "checkpoints"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in told:
            continue
        if (
            id(node) in decide
            and node.value not in OTHERS
            and f".{node.value.lower()}" in OWNERS
            and not is_own(path, f".{node.value.lower()}")
        ):
            yield f"{path.relative_to(SOURCE)}:{node.lineno}: {node.value}"
        pattern = _FILE if id(node) in decide and not reads_archives else _BARE
        for found in pattern.finditer(node.value):
            if not is_own(path, found[0].lower()):
                yield f"{path.relative_to(SOURCE)}:{node.lineno}: {found[0]}"


#: Modules that say how transformers and the Hub call the files of a model: these names are the library's own, and the
#: layer of the providers lies below that of the formats.
NAMES_OF_A_LIBRARY = (
    SOURCE / "providers" / "hub.py",
    SOURCE / "providers" / "hub_checksums.py",
    SOURCE / "live" / "providers" / "huggingface" / "remote_weights.py",
)


def is_own(path: Path, suffix: str) -> bool:
    return path in NAMES_OF_A_LIBRARY or path.is_relative_to(OWNERS[suffix])


def test_no_suffix_outside_its_format() -> None:
    assert [line for path in sorted(SOURCE.rglob("*.py")) for line in named(path)] == []


def test_the_search_finds_named_suffixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could never fail."""
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    monkeypatch.setattr(f"{__name__}.OWNERS", dict.fromkeys(OWNERS, tmp_path / "checkpoints" / "own"))
    file = tmp_path / "code.py"
    for line in (
        'SUFFIXES = (".pth",)',
        'name = f"{stem}.safetensors"',
        'found = re.compile(r"shard-\\d+\\.bin")',
        'told = "write a .PTH file"',
        'is_one = name == "model.safetensors"',
        'is_one = path.name.endswith("model.bin")',
        'is_one = path.name.endswith("pth")',
        'is_one = path.suffix[1:] == "safetensors"',
    ):
        file.write_text(line)
        assert list(named(file)), line
    for line in (
        '"""Reads best.pth, and any .pth."""',
        'told = "name one: best.pth"',
        "x = a.pt",
        'told = "data.bind"',
    ):
        file.write_text(line)
        assert list(named(file)) == [], line
