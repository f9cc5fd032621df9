"""Only the module and the handler of an edit contain code for it: no other code asks which edit it has."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

import modelcli
from modelcli import edits

SOURCE = Path(modelcli.__file__).parent
KINDS = [kind for name in edits.own_names() if (kind := edits.find(name)) is not None]
#: Words that Python uses for something else: `set` is also a type. A line of such an edit is still recognised.
COMMON = {name for name in edits.own_names() if name in vars(builtins)}
NAMES = {kind.name for kind in KINDS}
CLASSES = {kind.__name__ for kind in KINDS if kind.name not in COMMON}
#: The modules of the edits, and those that carry them out.
OWN = {kind.__module__ for kind in KINDS} | {kind.handler for kind in KINDS}
#: Methods and functions that compare a text with the name of an edit, or look an edit up by its name.
ASKING = {"get", "startswith", "endswith", "removeprefix", "removesuffix", "fromkeys", "find", "match", "fullmatch"}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def others() -> list[Path]:
    """Return all source files except the registry, the modules of edits and their handlers."""
    kept = OWN | {"modelcli.edits.registry"}
    inside = tuple(f"{own}." for own in OWN)
    return [
        file
        for file in sorted(SOURCE.rglob("*.py"))
        if (module := module_of(file)) not in kept and not module.startswith(inside)
    ]


def asked(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text where code imports an edit or its handler, or compares a value with an edit's name.

    Comparisons are `==`, `in`, `match`, lookups in mappings, keys of mappings and `startswith`. A collection with
    names of several edits counts as well.
    """
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                found = {module, *(f"{module}.{name.name}" for name in names)} & OWN
                found |= {name.name for name in names if module == "modelcli.edits" and name.name in CLASSES}
                yield from ((node.lineno, f"import {one}") for one in found)
            case ast.Import(names=names):
                yield from ((node.lineno, f"import {name.name}") for name in names if name.name in OWN)
            case ast.Attribute(value=value, attr=attribute) if attribute in CLASSES and ast.unparse(value) != "ast":
                yield node.lineno, f".{attribute}"
            case ast.Name(id=name) if name in CLASSES:
                yield node.lineno, name
            case ast.Compare(left=left, comparators=right):
                yield from named([left, *right])
            case ast.MatchValue(value=value):
                yield from named([value])
            case ast.Dict(keys=keys):
                yield from named([key for key in keys if key is not None])
            case ast.Subscript(slice=value):
                yield from named([value])
            case ast.Call(func=ast.Attribute(attr=attribute), args=args) if attribute in ASKING:
                yield from named(args)
            case ast.Call(args=args):
                yield from ((part.lineno, repr(part.value)) for part in args if is_module_of_an_edit(part))
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                if len({text for part in parts for _, text in named([part])}) > 1:
                    yield node.lineno, ast.unparse(node)


def is_module_of_an_edit(node: ast.expr) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in OWN


def named(nodes: list[ast.expr]) -> Iterator[tuple[int, str]]:
    """Yield the texts in expressions that are the name of an edit, or begin with one like a line of an edit."""
    for node in nodes:
        for part in ast.walk(node):
            if not (isinstance(part, ast.Constant) and isinstance(part.value, str)):
                continue
            if part.value in NAMES - COMMON or (part.value != part.value.rstrip() and part.value.rstrip() in NAMES):
                yield part.lineno, repr(part.value)


@pytest.mark.parametrize(
    "code",
    [
        "from modelcli.edits.replace import Replace",
        "from modelcli.edits import Replace",
        "from modelcli.live.surgery import cast",
        "import modelcli.edits.init",
        "importlib.import_module('modelcli.edits.init')",
        "isinstance(edit, edits.Freeze)",
        "isinstance(edit, Freeze)",
        "type(edit) is kinds.Freeze",
        "type(edit) is edits.find('freeze')",
        "action == 'freeze'",
        "action in ('freeze', 'thaw')",
        "line.startswith('extract ')",
        "action.endswith('freeze')",
        "re.match('freeze ', line)",
        "match action:\n case 'append': pass",
        "match edit:\n case Rename(): pass",
        "KINDS = ['insert', 'remove']",
        "HANDLERS = {'cast': 1}",
        "found.get('replace', [])",
        "found['replace']",
    ],
)
def test_code_that_asks_which_edit_it_has_is_found(code: str) -> None:
    assert list(asked(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["data.decode('utf-8', 'replace')", "command(['modelcli', 'rename', old, new])", "ast.Add"]
)
def test_other_code_is_not_reported(code: str) -> None:
    assert not list(asked(ast.parse(code)))


def test_no_other_file_asks_which_edit_it_has() -> None:
    found = {
        f"{file.relative_to(SOURCE)}:{line} {what}"
        for file in others()
        for line, what in asked(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert found == set()


def test_each_edit_has_one_line_of_the_registry_and_its_own_module() -> None:
    text = (SOURCE / "edits" / "registry.py").read_text(encoding="utf-8")
    for kind in KINDS:
        assert text.count(f'"{kind.name}"') == 1
        assert (kind.__module__, kind.__name__) == (f"modelcli.edits.{kind.name}", kind.name.capitalize())
