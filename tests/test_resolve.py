"""Parsing of references (section 2 of the contract). Nothing is imported to find out which model a text names."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelcli.errors import RequestError
from modelcli.language.expressions import Call, Name
from modelcli.language.references import CheckpointFile, NamedModel, PythonObject
from modelcli.resolve import parse
from tests.conftest import Cli


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("alexnet", Call("alexnet")),
        ("resnet18(num_classes=10)", Call("resnet18", (), {"num_classes": 10})),
        ("Sequential(Linear(20,30), ReLU())", Call("Sequential", (Call("Linear", (20, 30)), Call("ReLU")))),
        ("torchvision.ops.MLP(3, [4, 5])", Call("torchvision.ops.MLP", (3, [4, 5]))),
        ("Conv2d(1,2,3,padding_mode='a/b.pth')", Call("Conv2d", (1, 2, 3), {"padding_mode": "a/b.pth"})),
        ("Sequential(my.nets:Net(3))", Call("Sequential", (Call("my.nets:Net", (3,)),))),
        ("Wrap(kind=my.nets:Net)", Call("Wrap", (), {"kind": Name("my.nets:Net")})),
    ],
)
def test_builders_and_module_expressions(folder: Path, text: str, call: Call) -> None:
    assert parse(text) == NamedModel(call)
    assert parse(str(parse(text))) == NamedModel(call)


@pytest.mark.parametrize("text", ["locked/old.pth", "locked/old", "locked/nets.py:Net", "locked/"])
def test_a_path_without_permission_is_not_reported_as_missing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    own = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if "locked" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return own(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    named = text.partition(":")[0]
    result = cli("params", text, code=5)
    assert result.err.startswith(f"error: cannot read {named}: Permission denied\n")
    assert "you may not enter" in result.err


def test_a_bare_word_is_a_builder_first(folder: Path) -> None:
    (folder / "alexnet").mkdir()
    assert parse("alexnet") == NamedModel(Call("alexnet"))
    assert parse("./alexnet") == CheckpointFile(Path("alexnet"))
    assert parse("alexnet/") == CheckpointFile(Path("alexnet"))


@pytest.mark.parametrize("name", ["best.pth", "model.safetensors", "my model (1).bin", "a:b(3)", "weights"])
def test_an_existing_path_is_a_checkpoint_whatever_its_name(folder: Path, name: str) -> None:
    (folder / "run").mkdir()
    (folder / "run" / name).touch()
    assert parse(f"run/{name}") == CheckpointFile(Path("run") / name)
    assert parse(f"run/{name}", folder) == CheckpointFile(folder / "run" / name)
    assert parse(str(folder / "run" / name)) == CheckpointFile(folder / "run" / name)


def test_a_python_object(folder: Path) -> None:
    assert parse("nets.py:Net(3,2)") == PythonObject("nets.py", "Net", Call("Net", (3, 2)), Path("nets.py"))
    assert parse("nets.py:instance") == PythonObject("nets.py", "instance", None, Path("nets.py"))
    assert parse("package.module:build(depth=3)") == PythonObject(
        "package.module", "build", Call("build", (), {"depth": 3})
    )
    assert parse("nets:Outer.Inner()") == PythonObject("nets", "Outer.Inner", Call("Outer.Inner"))
    for text in ("nets.py:Net(3,2)", "nets.py:instance", "package.module:build(depth=3)"):
        assert str(parse(text)) == text
    assert parse("(package.module:build(depth=3))") == parse("package.module:build(depth=3)")


@pytest.mark.parametrize("name", ["runs (1)", "12:30", "a b", "x(y", "d.py:e"])
def test_a_python_file_may_lie_in_a_folder_of_any_name(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "nets.py").touch()
    file = folder / name / "nets.py"
    assert parse(f"{file}:Net(3)") == PythonObject(str(file), "Net", Call("Net", (3,)), file)


def test_a_python_reference_runs_nothing(folder: Path) -> None:
    (folder / "bomb.py").write_text("raise SystemExit('it ran')\nclass Net: ...\n")
    assert isinstance(parse("bomb.py:Net"), PythonObject)
    with pytest.raises(RequestError, match=r"bomb\.py names a file"):
        parse("bomb.py")


def test_relative_paths_start_at_the_given_folder(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "own.py").touch()
    found = parse("own.py:Net", folder / "sub")
    assert found == PythonObject("own.py", "Net", None, folder / "sub" / "own.py")
    assert isinstance(found, PythonObject)
    assert found.relative_to(folder) == "sub/own.py:Net"
    (folder / "other").mkdir()
    moved = found.relative_to(folder / "other")
    assert moved == "../sub/own.py:Net"
    again = parse(moved, folder / "other")
    assert isinstance(again, PythonObject)
    assert again.file is not None
    assert again.file.samefile(folder / "sub" / "own.py")
    importable = parse("package.module:Net")
    assert isinstance(importable, PythonObject)
    assert importable.relative_to(folder) == "package.module:Net"


def test_a_python_file_alone_names_the_classes_in_it(folder: Path) -> None:
    with pytest.raises(RequestError) as caught:
        parse("nets.py")
    assert caught.value.message == "nets.py names a file, not a class in it"
    assert "nets.py:Net, nets.py:MyLinear, nets.py:Tied" in (caught.value.hint or "")


def test_a_python_file_without_classes_or_with_a_syntax_error(folder: Path) -> None:
    (folder / "empty.py").write_text("x = 1\n")
    with pytest.raises(RequestError, match="names no class, and the file has none"):
        parse("empty.py")
    (folder / "warns.py").write_text("x = '\\d'\nclass Net: ...\n")
    with pytest.raises(RequestError, match="names a file, not a class"):
        parse("warns.py")
    for number, text in enumerate((b"class (:", b"\0", b"\xff\xfe", b"x = " + b"(" * 9999, b"-" * 99_999 + b"1")):
        (folder / f"broken{number}.py").write_bytes(text)
        with pytest.raises(RequestError, match="is not valid Python"):
            parse(f"broken{number}.py")
    (folder / "folder.py").mkdir()
    assert parse("folder.py") == CheckpointFile(Path("folder.py"))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("bset.pth", "no such file: bset.pth", "best.pth"),
        ("runs/bset.pth", "no such file: runs/bset.pth", "the folder runs does not exist"),
        ("bets.safetensors", "no such file: bets.safetensors", ""),
        ("./alexnt", "no such file: ./alexnt", ""),
        ("shards/", "no such file: shards/", ""),
        ("net.py", "no such file: net.py", "nets.py"),
        ("net.py:Net", "no such file: net.py", "nets.py"),
        ("nets.py:", "'' after the colon of nets.py: is not a name", "nets.py:Net(3,2)"),
        ("nets.py:1x", "'1x' after the colon", ""),
        ("a-b:Net", "'a-b' before the colon is neither a Python file nor an importable module", ""),
        ("", "an empty model reference", "alexnet"),
        ("  ", "an empty model reference", "alexnet"),
        ("resnet18(", "cannot read 'resnet18('", "write"),
        ("a b", "cannot read 'a b'", ""),
        ("nets.py:Net(open('x'))[0]", "is not allowed in", "nothing in an expression is evaluated"),
    ],
)
def test_any_other_text_is_an_error_with_the_closest_names(folder: Path, text: str, message: str, hint: str) -> None:
    (folder / "best.pth").touch()
    with pytest.raises(RequestError) as caught:
        parse(text)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert caught.value.exit_code == 2


def test_a_drive_letter_is_not_a_module_name(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"no such file: C:\\best\.pth"):
        parse("C:\\best.pth")
    with pytest.raises(RequestError, match=r"no such file: C:\\nets\.py"):
        parse("C:\\nets.py:Net(3)")


@pytest.mark.parametrize(
    "text", ["x" * 5000 + ".pth", "x" * 300 + "/y.pth", "x" * 300 + ".py:Net", "a\0.pth", "a\0.py:Net", "\udcff.pth"]
)
def test_an_impossible_file_name_is_reported_as_missing(folder: Path, text: str) -> None:
    with pytest.raises(RequestError, match="no such file"):
        parse(text)


def test_only_the_longest_possible_path_of_a_text_is_looked_up(folder: Path) -> None:
    start = time.process_time()
    with pytest.raises(RequestError):
        parse("a/" * 16_000 + ".py:" * 16_000)
    assert time.process_time() - start < 2


@given(st.text(max_size=40) | st.text("aN.py:()/\\'\"=,3 ", max_size=25))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_reference_or_a_modelcli_error(folder: Path, text: str) -> None:
    try:
        found = parse(text, folder)
    except RequestError:
        return
    assert isinstance(found, NamedModel | PythonObject | CheckpointFile)
    if isinstance(found, NamedModel):
        assert parse(str(found), folder) == found
