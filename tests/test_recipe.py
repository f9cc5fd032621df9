"""The working recipe: a TOML file that people read, edit by hand and commit. Section 6 of the contract."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelcli import edits, recipe, resolve
from modelcli.edits import Edit
from modelcli.errors import RequestError, SystemFailureError
from modelcli.files import atomic
from modelcli.language.references import CheckpointFile, PythonObject, Source, parse_input_size
from modelcli.recipe import append, read, remove_last, start
from tests.conftest import Cli

WRITTEN_BY_HAND = """\
# the classifier of our cats, version 3
weights = "DEFAULT"  # from torchvision
model   = 'alexnet'

# what was done to it
edits = [
    "replace classifier.6 Linear(4096,10)",  # ten cats
    # the features are good as they are
    "freeze features",
]
seed = 7
"""


def edit(line: str) -> Edit:
    return edits.parse(line)


def written(folder: Path, text: str) -> Path:
    path = folder / "modelcli.toml"
    path.write_bytes(text.encode())
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(RequestError) as caught:
        read(path)
    assert caught.value.exit_code == 2
    return caught.value.message.split("\n")


def test_a_recipe_as_the_contract_shows_it(folder: Path) -> None:
    path = written(
        folder,
        'model = "alexnet"\nweights = "DEFAULT"\nseed = 0\nedits = [\n'
        '    "replace classifier.6 Linear(4096,10)",\n    "freeze features",\n]\n',
    )
    found = read(path)
    assert found.source == Source("alexnet", weights="DEFAULT", seed=0, folder=folder)
    assert found.edits == (edit("replace classifier.6 Linear(4096,10)"), edit("freeze features"))


def test_every_key(folder: Path) -> None:
    path = written(
        folder,
        'model = "a.pth"\nweights = "b.pth"\narch = "nets.py:Net"\nkey = "ema"\nseed = 3\nstrict = false\n'
        'input_size = ["1,3,8,8", "1x4"]\ninput_dtype = ["float32", "torch.int64"]\nedits = []\n',
    )
    assert read(path).source == Source(
        "a.pth",
        weights="b.pth",
        arch="nets.py:Net",
        key="ema",
        seed=3,
        strict=False,
        input_size=((1, 3, 8, 8), (1, 4)),
        input_dtype=("float32", "int64"),
        folder=folder,
    )


def test_missing_keys_have_their_defaults(folder: Path) -> None:
    found = read(written(folder, 'model = "alexnet"\n'))
    assert found.source == Source("alexnet", folder=folder)
    assert found.edits == ()


def test_one_input_may_be_text_instead_of_a_list(folder: Path) -> None:
    found = read(written(folder, 'model = "a"\ninput_size = "2,3"\ninput_dtype = "int64"\n'))
    assert found.source.input_size == ((2, 3),)
    assert found.source.input_dtype == ("int64",)


@pytest.mark.parametrize(
    ("text", "shape"), [("1,3,224,224", (1, 3, 224, 224)), ("1x3x8", (1, 3, 8)), ("[1, 3]", (1, 3))]
)
def test_an_input_size(text: str, shape: tuple[int, ...]) -> None:
    assert parse_input_size(text) == shape


@pytest.mark.parametrize("text", ["", "1,,3", "1,a", "-1,3", "1.5", "1;3", "\uff11,3"])
def test_an_invalid_input_size_is_an_error(text: str) -> None:
    with pytest.raises(RequestError, match="is not a list of whole numbers") as caught:
        parse_input_size(text)
    assert repr(text) in caught.value.message
    assert caught.value.hint == "write 1,3,224,224, batch included"


def test_paths_are_relative_to_the_recipe(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "own.py").touch()
    (folder / "deep" / "best.pth").touch()
    path = written(folder / "deep", 'model = "own.py:Net"\n')
    assert resolve.reference_of(read(path).source) == PythonObject("own.py", "Net", None, folder / "deep" / "own.py")
    path = written(folder / "deep", 'model = "./best.pth"\n')
    assert resolve.reference_of(read(path).source) == CheckpointFile(folder / "deep" / "best.pth")


def test_how_the_path_of_the_recipe_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELCLI_RECIPE", raising=False)
    assert recipe.default_path() == Path("modelcli.toml")
    monkeypatch.setenv("MODELCLI_RECIPE", "other/one.toml")
    assert recipe.default_path() == Path("other/one.toml")
    monkeypatch.setenv("MODELCLI_RECIPE", "")
    assert recipe.default_path() == Path("modelcli.toml")


def test_the_error_without_a_recipe_says_how_to_name_a_model(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"no model is given, and there is no modelcli\.toml") as caught:
        read(Path("modelcli.toml"))
    assert "modelcli load alexnet" in (caught.value.hint or "")


# --- all errors at once --------------------------------------------------------------------------------------------


def test_unknown_keys_and_bad_lines_are_reported_all_at_once(folder: Path) -> None:
    path = written(
        folder,
        "# a comment\n"  # 1
        'modle = "alexnet"\n'  # 2
        "seed = -1\n"  # 3
        "weights = 3\n"  # 4
        'input_size = ["1,3", "1,a"]\n'  # 5
        'input_dtype = "flaot32"\n'  # 6
        "strict = 1\n"  # 7
        "colour = 'red'\n"  # 8
        "edits = [\n"  # 9
        '    "freeze features",\n'  # 10
        '    "frezee features",\n'  # 11
        '    # "freeze a{", is how not to write it\n'  # 12
        '    "freeze a{", "replace x",\n'  # 13
        "    3,\n"  # 14
        '    "frezee features",\n'  # 15
        "    'replace b \"Conv2d(3\"',\n"  # 16
        "]\n",
    )
    found = problems(path)
    expected = [
        (1, "no model"),
        (2, "unknown key 'modle', did you mean model?"),
        (3, "seed must be a whole number from 0 to 2^63 - 1, not -1"),
        (4, "weights must be a string, not 3"),
        (5, "input size '1,a'"),
        (6, "no dtype 'flaot32', did you mean float32?"),
        (7, "strict must be true or false, not 1"),
        (8, "unknown key 'colour'"),
        (11, "no such edit: 'frezee' (did you mean freeze"),
        (13, "selector 'a{': { without }"),
        (13, "replace takes a target and a module"),
        (14, "an edit must be a string, not 3"),
        (15, "no such edit: 'frezee' (did you mean freeze"),
        (16, "cannot read 'Conv2d(3'"),
    ]
    assert len(found) == len(expected)
    for line, (number, words) in zip(found, expected, strict=True):
        assert line.startswith(f"{path}:{number}: ")
        assert words in line


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("model = \n", 1, "unexpected end of the line: model ="),
        ("model = alexnet\n", 1, "unexpected 'a': model = alexnet"),
        ('model = "a"\nedits = [\n "freeze b,\n]\n', 3, 'a string has no closing quote: "freeze b,'),
        ('model = "a"\ninput_size = [1, 3]\n', 2, "input_size must be a string like '1,3,224,224', not [1, 3]"),
        ('model = "a"\nedits = [\n', 2, "the text ends in the middle of a value"),
        ('model = "a"\nmodel = "b"\n', 2, 'key "model" already exists: model = "b"'),
        ('model = "a"\n\nwhat is this\n', 3, ""),
        ('model = "a"\nedits = "freeze a"\n', 2, "edits must be a list of strings, not 'freeze a'"),
        ('model = "a"\n[edits]\nx = 1\n', 2, "edits must be a list of strings"),
        ('model = "a"\n[[edits]]\nx = 1\n', 2, "an edit must be a string"),
        ('model = "a"\nedits = ["freeze \\u0061{"]\n', 2, "selector 'a{'"),
        ('model = "a"\nedits = [\n "freeze a",\n """frezee\nb"""]\n', 4, "no such edit: 'frezee'"),
        ('model = ["a"]\n', 1, "model must be a string, not ['a']"),
        ('model = "a"\nseed = true\n', 2, "not True"),
        ('model = "a"\nseed = 1.0\n', 2, "not 1.0"),
        (f'model = "a"\nseed = {2**63}\n', 2, "from 0 to 2^63 - 1"),
        ('model = "a"\n"key" = 1\n', 2, "key must be a string, not 1"),
        ('model = "a"\n[ tool.x ]\n', 2, "unknown key 'tool'"),
        ('model = "a"\r\n# c\r\nseed = -2\r\n', 3, "not -2"),
    ],
)
def test_an_error_names_its_line(folder: Path, text: str, line: int, words: str) -> None:
    path = written(folder, text)
    found = problems(path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:{line}: ")
    assert words in found[0]


def test_a_recipe_that_is_not_text_is_an_error(folder: Path) -> None:
    path = folder / "modelcli.toml"
    path.write_bytes(b'model = "\xff"')
    assert problems(path)[0].startswith(f"{path} is not UTF-8 text")
    if sys.platform != "win32":
        assert problems(folder) == [f"{folder} is a folder, not a recipe"]


@given(st.text(max_size=60) | st.text("model=edits[]\"'\n.#,{}1 ", max_size=60))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_recipe_or_a_modelcli_error(folder: Path, text: str) -> None:
    path = folder / "modelcli.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        found = read(path)
    except RequestError:
        return
    assert found.source.model == tomllib.loads(text)["model"]


def test_deep_nesting_is_a_modelcli_error(folder: Path) -> None:
    assert str(folder) in problems(written(folder, 'model = "a"\nx = ' + "[" * 20_000))[0]


# --- what modelcli writes into it ----------------------------------------------------------------------------------


def test_a_new_recipe(folder: Path) -> None:
    path = folder / "modelcli.toml"
    start(path, Source("alexnet", weights="DEFAULT"))
    assert path.read_text() == 'model = "alexnet"\nweights = "DEFAULT"\nseed = 0\nedits = []\n'
    append(path, [edit("replace classifier.6 Linear(4096,10)")])
    append(path, [edit("freeze features")])
    assert path.read_text() == (
        'model = "alexnet"\nweights = "DEFAULT"\nseed = 0\nedits = [\n'
        '    "replace classifier.6 Linear(4096,10)",\n    "freeze features",\n]\n'
    )


def test_a_new_recipe_contains_every_option_given(folder: Path) -> None:
    path = folder / "made" / "for" / "it.toml"
    source = Source(
        "a.pth",
        weights="b.pth",
        arch='nets.py:Net("x")',
        key="ema",
        seed=2**63 - 1,
        input_size=((1, 3), (2,)),
        input_dtype=("float32", "int64"),
        folder=path.parent,
        strict=False,
    )
    start(path, source)
    assert read(path).source == source
    assert tomllib.loads(path.read_text())["input_size"] == ["1,3", "2"]


def test_comments_order_and_spaces_survive_appending(folder: Path) -> None:
    path = written(folder, WRITTEN_BY_HAND)
    append(path, [edit("unfreeze features.10")])
    assert path.read_text() == WRITTEN_BY_HAND.replace(
        '    "freeze features",\n', '    "freeze features",\n    "unfreeze features.10",\n'
    )
    assert remove_last(path, 1) == ["unfreeze features.10"]
    assert path.read_text() == WRITTEN_BY_HAND


def test_undo_keeps_comments_that_do_not_belong_to_the_edit(folder: Path) -> None:
    path = written(folder, WRITTEN_BY_HAND)
    assert remove_last(path, 1) == ["freeze features"]
    text = path.read_text()
    for comment in ("# the classifier", "# from torchvision", "# what was", "# ten cats", "# the features are good"):
        assert comment in text
    assert read(path).edits == (edit("replace classifier.6 Linear(4096,10)"),)
    assert text.index("weights") < text.index("model") < text.index("edits") < text.index("seed")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("edits = []", 'edits = [\n    "freeze b",\n    "freeze c",\n]'),
        ("edits=[ ] # none", 'edits=[\n    "freeze b",\n    "freeze c",\n] # none'),
        ('edits = ["freeze a"] # why', 'edits = [\n    "freeze a",\n    "freeze b",\n    "freeze c",\n] # why'),
        ('edits = [\n    "freeze a"\n]', 'edits = [\n    "freeze a",\n    "freeze b",\n    "freeze c",\n]'),
        ('edits = [\n    "freeze a",\n]', 'edits = [\n    "freeze a",\n    "freeze b",\n    "freeze c",\n]'),
        (
            'edits = [\n  "freeze x", "freeze y",\n]',
            'edits = [\n  "freeze x", "freeze y",\n    "freeze b",\n    "freeze c",\n]',
        ),
        ("edits = [\n    # none yet\n]", 'edits = [\n    # none yet\n    "freeze b",\n    "freeze c",\n]'),
    ],
)
def test_one_line_and_many_line_lists(folder: Path, before: str, after: str) -> None:
    path = written(folder, f'model = "a"\n{before}\nseed = 1\n')
    append(path, [edit("freeze b"), edit("freeze c")])
    assert path.read_text() == f'model = "a"\n{after}\nseed = 1\n'


def test_a_recipe_without_a_list_gets_one(folder: Path) -> None:
    path = written(folder, 'model = "a" # mine\n')
    append(path, [edit("freeze b")])
    assert path.read_text() == 'model = "a" # mine\nedits = [\n    "freeze b",\n]\n'


@pytest.mark.parametrize(
    "text", ['edits = ["freeze a", "freeze b"]', 'edits = [\n    "freeze a",\n    "freeze b",\n]', "edits = []"]
)
def test_an_emptied_list_is_an_empty_list(folder: Path, text: str) -> None:
    path = written(folder, f'model = "a"\n{text}\n')
    assert remove_last(path, 9) == (["freeze a", "freeze b"] if "freeze" in text else [])
    assert path.read_text() == 'model = "a"\nedits = []\n'


def test_undone_edits_are_returned_in_order(folder: Path) -> None:
    path = written(folder, 'model = "a"\nedits = ["freeze a", "freeze b", "freeze c"]\n')
    assert remove_last(path, 2) == ["freeze b", "freeze c"]
    assert tomllib.loads(path.read_text())["edits"] == ["freeze a"]


def test_windows_line_ends_are_kept_and_not_mixed(folder: Path) -> None:
    path = written(folder, WRITTEN_BY_HAND.replace("\n", "\r\n"))
    append(path, [edit("freeze x")])
    data = path.read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n") == WRITTEN_BY_HAND.count("\n") + 1
    assert read(path).edits[-1] == edit("freeze x")


def test_a_byte_order_mark_is_ignored(folder: Path) -> None:
    path = written(folder, '\ufeffmodel = "alexnet"\n')
    assert read(path).source.model == "alexnet"


lines = st.sampled_from(
    [
        "freeze features",
        "freeze 'a b' --except 'it''s'",
        "replace c \"Conv2d(1,2,3,padding_mode='x y')\"",
        'replace c \'M("\\"#")\'',
        "freeze \u6a21 -- -x",
    ]
)
around = st.sampled_from(
    [
        'model = "a"\nedits = []\n',
        'model = "a"\n',
        WRITTEN_BY_HAND,
        'edits = ["freeze a"]\nmodel = "a"',
        'model = "a"\nedits = [\n  # first\n  "freeze a", # second\n  # third\n]\n# fourth\n',
    ]
)


@given(around, st.lists(lines, min_size=1, max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_appended_edits_can_be_read_and_undone(folder: Path, text: str, added: list[str]) -> None:
    path = written(folder, text)
    before = read(path)
    new = [edit(line) for line in added]
    for one in new:
        append(path, [one])
    one_by_one = path.read_text()
    assert read(path).edits == (*before.edits, *new)
    assert tomllib.loads(one_by_one)["edits"] == [*tomllib.loads(text).get("edits", []), *map(str, new)]
    path = written(folder, text)
    append(path, new)
    assert path.read_text() == one_by_one
    assert remove_last(path, len(new)) == list(map(str, new))
    assert read(path) == before
    assert [line for line in text.split("\n") if "#" in line] == [
        line for line in path.read_text().split("\n") if "#" in line
    ]


# --- how it is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = written(folder, WRITTEN_BY_HAND)
    before = set(folder.iterdir())

    def fails(*_: Any, **_folders: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_exchange", lambda *_names: False)
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(SystemFailureError, match=r"cannot write .*: No space left on device"):
        append(path, [edit("freeze x")])
    assert path.read_text() == WRITTEN_BY_HAND
    assert set(folder.iterdir()) == before


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files are POSIX's")
def test_the_mode_of_the_file_stays(folder: Path) -> None:
    path = written(folder, WRITTEN_BY_HAND)
    path.chmod(0o640)
    append(path, [edit("freeze x")])
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_name_that_is_not_valid_text_is_refused_and_nothing_written(folder: Path) -> None:
    path = folder / "modelcli.toml"
    with pytest.raises(RequestError, match="a recipe is UTF-8 text"):
        start(path, Source("\udcff.pth"))
    assert not path.exists()


def test_an_invalid_edit_is_reported_with_its_line(folder: Path) -> None:
    path = folder / "bad.toml"
    path.write_text('model = "alexnet"\nedits = [\n  "freeze features", # 3\n  # 3, true\n  3,\n  true,\n]\n')
    with pytest.raises(RequestError) as caught:
        recipe.read(path)
    lines = [line.removeprefix(f"{path}:") for line in caught.value.message.splitlines()]
    assert lines == ["5: an edit must be a string, not 3", "6: an edit must be a string, not True"]


def test_a_recipe_without_a_model_applies_to_any_model(cli: Cli) -> None:
    Path("half.toml").write_text('edits = [\n  "cast . half # to save space",\n]\n')
    document = cli("apply", "half.toml", "-m", "Sequential(Linear(2,3))", "--json").json
    assert document["edits"] == ["cast . float16"]
    assert "pass -m MODEL to apply" in cli("apply", "half.toml", code=2).err
    assert "nn.Sequential(nn.Linear(2, 3))" in cli("script", "half.toml", "-m", "Sequential(Linear(2,3))").out


GREY = ("replace", "conv1", "Conv2d(1,_,_,stride=_,padding=_,bias=_)", "--input-size", "1,1,64,64")


def test_an_edit_with_another_input_records_the_input_in_the_recipe(cli: Cli) -> None:
    """The recorded edits must run again later, and they only fit that input."""
    assert cli("load", "resnet18").code == 0
    made = cli(*GREY)
    assert made.code == 0, made.err
    assert "note: modelcli.toml now records the input that you stated" in made.err
    document = tomllib.loads(Path("modelcli.toml").read_text())
    assert document["input_size"] == "1,1,64,64"
    assert list(document)[-1] == "edits"
    after = cli("replace", "fc", "Linear(_,10)")
    assert "runs: [1,1,64,64] -> [1,10]" in after.out
    assert "now records the input" not in after.err
    assert cli("save", "grey.pth").code == 0
    assert "input_size: 1,1,64,64\n" in cli("log").out


def test_an_input_in_the_recipe_is_kept(cli: Cli) -> None:
    text = 'model = "Linear(2,3)"  # mine\n# what flows in\ninput_size = "1,2"\n# and what is done\nedits = []\n'
    Path("modelcli.toml").write_text(text)
    assert cli("freeze", "bias", "--input-size", "1,2").code == 0
    assert Path("modelcli.toml").read_text() == text.replace("[]", '[\n    "freeze bias",\n]')
    assert cli("freeze", "weight", "--input-size", "5,2").code == 0
    assert '"5,2"\n# and what is done\nedits = [' in Path("modelcli.toml").read_text()


def test_an_input_in_another_form_replaces_the_previous_one(cli: Cli) -> None:
    Path("modelcli.toml").write_text('model = "Linear(2,3)"\ninput_size = "1,2"\nedits = []')
    assert cli("freeze", "bias", "--input", "input=4,2").code == 0
    document = tomllib.loads(Path("modelcli.toml").read_text())
    assert document == {"model": "Linear(2,3)", "inputs": ["input=4,2"], "edits": ["freeze bias"]}


def test_a_dry_run_does_not_record_the_input(cli: Cli) -> None:
    assert cli("load", "resnet18").code == 0
    before = Path("modelcli.toml").read_bytes()
    assert cli(*GREY, "--dry-run").code == 0
    assert Path("modelcli.toml").read_bytes() == before


def test_a_note_names_options_that_a_recipe_does_not_record(cli: Cli) -> None:
    assert cli("load", "Linear(2,3)").code == 0
    shown = cli("freeze", "bias", "--seed", "4")
    assert "note: --seed applies to this command only: modelcli.toml has another value, and is unchanged" in shown.err
    assert "this command only" not in cli("freeze", "weight", "--seed", "0").err
