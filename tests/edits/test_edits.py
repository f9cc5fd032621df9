"""Edits as lines of text: the words and options of the command, split as a POSIX shell splits them."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcli import edits
from modelcli.edits import Edit, from_words
from modelcli.edits.freeze import Freeze
from modelcli.edits.init import Init
from modelcli.edits.replace import Replace
from modelcli.edits.unfreeze import Unfreeze
from modelcli.errors import RequestError
from modelcli.language.expressions import Call
from tests.language.test_expressions import calls


@pytest.mark.parametrize(
    ("line", "edit"),
    [
        ("replace classifier.6 Linear(4096,10)", Replace(target="classifier.6", module=Call("Linear", (4096, 10)))),
        (
            "replace classifier.6 Linear 4096 10 bias=False",
            Replace(target="classifier.6", module=Call("Linear", (4096, 10), {"bias": False})),
        ),
        (
            "replace 'classifier.6' 'Linear(4096, 10)'",
            Replace(target="classifier.6", module=Call("Linear", (4096, 10))),
        ),
        ("replace head Linear(4096, 10)", Replace(target="head", module=Call("Linear", (4096, 10)))),
        ("replace x Flatten 1 -1", Replace(target="x", module=Call("Flatten", (1, -1)))),
        ("replace x LeakyReLU -0.1", Replace(target="x", module=Call("LeakyReLU", (-0.1,)))),
        (
            "replace x Conv2d 3 8 1 padding_mode=reflect",
            Replace(target="x", module=Call("Conv2d", (3, 8, 1), {"padding_mode": "reflect"})),
        ),
        ("freeze features", Freeze(targets=("features",))),
        ("freeze 'features.*' '**.bn?'", Freeze(targets=("features.*", "**.bn?"))),
        ("freeze features.* **:Conv2d", Freeze(targets=("features.*", "**:Conv2d"))),  # no shell expands a line
        ("unfreeze . --except features", Unfreeze(targets=(".",), without=("features",))),
        ("unfreeze --except=a --except b .", Unfreeze(targets=(".",), without=("a", "b"))),
        ("freeze **.bias --expect 8", Freeze(targets=("**.bias",), expect=8)),
        ("freeze --expect=8 -- **.bias", Freeze(targets=("**.bias",), expect=8)),
        ("freeze -- -x", Freeze(targets=("-x",))),
        ("freeze classifier.-1", Freeze(targets=("classifier.-1",))),
        ("  freeze\ta  ", Freeze(targets=("a",))),
        ("freeze a # the backbone", Freeze(targets=("a",))),
        ("freeze a#b '#c' \\#d", Freeze(targets=("a#b", "#c", "#d"))),
        ("freeze a # it's\n b", Freeze(targets=("a", "b"))),
        (
            "init . kaiming_normal(nonlinearity=relu) --bias uniform(b=1)",
            Init(
                targets=(".",),
                scheme=Call("kaiming_normal", (), {"nonlinearity": "relu"}),
                bias=Call("uniform", (), {"b": 1}),
            ),
        ),
        (
            'init . kaiming_normal(mode="fan_out")',  # a shell takes the quotes
            Init(targets=(".",), scheme=Call("kaiming_normal", (), {"mode": "fan_out"})),
        ),
    ],
)
def test_a_line_of_text(line: str, edit: Edit) -> None:
    assert edits.parse(line) == edit
    assert edits.parse(str(edit)) == edit


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (Replace(target="classifier.6", module=Call("Linear", (4096, 10))), "replace classifier.6 Linear(4096,10)"),
        (
            Freeze(targets=("features.*",), without=("**.bn?",), expect=3),
            "freeze features.* --except **.bn? --expect 3",
        ),
        (
            Replace(target="c", module=Call("Conv2d", (3, 8, 1), {"padding_mode": "reflect"})),
            "replace c \"Conv2d(3,8,1,padding_mode='reflect')\"",
        ),
        (Freeze(targets=("-x", "b"), expect=2), "freeze --expect 2 -- -x b"),
        (Freeze(targets=("a b",)), "freeze 'a b'"),
        (Freeze(targets=("#a", "b#")), "freeze '#a' b#"),
    ],
)
def test_the_line_of_an_edit_is_as_a_person_writes_it(edit: Edit, line: str) -> None:
    assert str(edit) == line


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("", "an empty edit", "replace, wrap, set, add"),
        ("   ", "an empty edit", "replace, wrap, set, add"),
        ("frezee features", "no such edit: 'frezee'", "freeze"),
        ("Freeze features", "no such edit: 'Freeze'", "freeze"),
        ("explode features", "no such edit: 'explode'", "replace, wrap, set, add"),
        ("freeze", "freeze takes at least one target", "freeze features"),
        ("freeze --except a", "freeze takes at least one target", ""),
        ("replace classifier.6", "replace takes a target and a module", "replace classifier.6"),
        ("freeze 'features", 'cannot split "freeze \'features" into words: No closing quotation', ""),
        ("freeze a --exept b", "no such option: --exept", "--except"),
        ("freeze a -e b", "no such option: -e", ""),
        ("reshape w -1,2x", "no such option: -1,2x", ""),
        ("permute w -1,0", "'-1,0' is no list of axes: they are numbers from 0", ""),
        ("freeze a --except", "--except takes a value", ""),
        ("freeze a --expect", "--expect takes a value", ""),
        ("freeze a --expect many", "--expect takes a number, not 'many'", ""),
        ("freeze a --expect -1", "--expect takes a number, not '-1'", ""),
        ("freeze a{", "selector 'a{': { without }", ""),
        ("freeze a --except a..b", "selector 'a..b' has an empty component", ""),
        ("replace a[ ReLU", "selector 'a[': [ without ]", ""),
        ("replace a Linear(4096,", "cannot read 'Linear(4096,'", ""),
        (
            "replace a Linear(2,3,bias=false)",
            "false is not a Python value in 'Linear(2,3,bias=false)'",
            "did you mean False?",
        ),
        ("replace a Linear 2 3 bias=false", "false is not a Python value in 'false'", "did you mean False?"),
        ("replace Linear(1,2) a", "replace takes the path before the module", "replace a 'Linear(1,2)'"),
        ("add Linear(1,2) a.b", "add takes the path before the module", "add a.b 'Linear(1,2)'"),
        ("init a 2", "'2' is not a scheme", "the scheme comes last: init '**:Conv2d' xavier_uniform"),
        ("init a b.0", "cannot read 'b.0'", "the scheme comes last"),
        ("init a normal(", "cannot read 'normal('", "the scheme comes last"),
        ("init a ones --bias 3", "'3' is not a scheme", "--bias takes a scheme: ones, or 'normal(0, 0.01)'"),
        ("replace a Linear(open('x').read())", "is not allowed in", "nothing in an expression is evaluated"),
    ],
)
def test_a_bad_line_names_the_word_that_is_wrong(line: str, message: str, hint: str) -> None:
    with pytest.raises(RequestError) as caught:
        edits.parse(line)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert caught.value.exit_code == 2


def test_words_of_a_command_line_make_the_same_edit() -> None:
    assert from_words("replace", ["head", "Linear", "3", "-1"]) == edits.parse("replace head Linear 3 -1")
    assert from_words("freeze", ["a b"]) == Freeze(targets=("a b",))


@given(st.text("ab \"'\\\n\t\r\u00e9\u00a0\u2028$\0", max_size=20))
@settings(max_examples=1000, deadline=None)
def test_words_are_those_of_a_posix_shell(line: str) -> None:
    try:
        expected = shlex.split(line)
    except ValueError:
        with pytest.raises(RequestError, match="cannot split"):
            edits.split_words(line)
    else:
        assert edits.split_words(line) == expected


@pytest.mark.skipif(shutil.which("sh") is None, reason="asks a shell")
@pytest.mark.parametrize(
    "line", ["a # b c", "# a", "a#b", "a '#' b", "a \\# b", "''# a", "a\t#b' \"", "a # b\nc", "a #\n#\n b # c"]
)
def test_comments_are_those_of_a_shell(line: str) -> None:
    script = "set -- " + '\nset -- "$@" '.join(line.split("\n")) + '\nfor word; do printf "%s\\0" "$word"; done'
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert edits.split_words(line) == words


@pytest.mark.parametrize(
    "line",
    [
        "freeze " + "a" * 1_000_000,
        "freeze a " + "#" * 1_000_000,
        "freeze a" + "\n# b" * 300_000,
        "freeze '" + "a" * 1_000_000,
        "freeze " + "'a'" * 300_000,
        "freeze " + '"\\"' * 300_000,
        "freeze a" + " --except a" * 100_000,
        "freeze" + " --expect 1" * 100_000,
    ],
)
def test_a_long_line_takes_time_that_grows_with_it(line: str) -> None:
    start = time.process_time()
    with contextlib.suppress(RequestError):
        edits.parse(line)
    assert time.process_time() - start < 5


selector_texts = st.text(
    st.characters(exclude_characters="[]{}*?:.\\@", exclude_categories=["Cs"]), min_size=1, max_size=10
) | st.sampled_from(["**.bn?", "features.*:Conv2d", "layers.[0-3]", "-x", "--", "--except=a", "classifier.-1", "{a,b}"])
options: dict[str, Any] = {
    "without": st.lists(selector_texts, max_size=2).map(tuple),
    "expect": st.none() | st.integers(0, 999_999_999),
}
targets = st.lists(selector_texts, min_size=1, max_size=3).map(tuple)
some_edit = (
    st.builds(Replace, target=selector_texts, module=calls, **options)
    | st.builds(Freeze, targets=targets, **options)
    | st.builds(Unfreeze, targets=targets, **options)
)


@given(some_edit)
@settings(deadline=None)
def test_a_line_parses_to_the_same_edit(edit: Edit) -> None:
    assert edits.parse(str(edit)) == edit
    words = shlex.split(str(edit))
    assert from_words(words[0], words[1:]) == edit


@given(st.text(max_size=60) | st.text("freplacz -='\"\\(),*.{}[]1 ", max_size=40).map("freeze {}".format))
@settings(deadline=None)
def test_any_text_is_an_edit_or_a_modelcli_error(line: str) -> None:
    try:
        edit = edits.parse(line)
    except RequestError:
        return
    assert edits.parse(str(edit)) == edit
