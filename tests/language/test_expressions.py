"""Module expressions: section 4 of the contract. Nothing in them is ever evaluated."""

from __future__ import annotations

import keyword
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcli.errors import RequestError
from modelcli.language.expressions import HOLE, Call, Name, names_in, parse, parse_value, parse_words, to_text, to_words


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("-1", -1),
        ("+3", 3),
        ("0.5", 0.5),
        ("1e-3", 0.001),
        ("True", True),
        ("None", None),
        ("'reflect'", "reflect"),
        ('"same"', "same"),
        ("'gr\u00f6\u00dfe'", "gr\u00f6\u00dfe"),
        ("'[0-9]: a:B'", "[0-9]: a:B"),
        ("(3, 5)", (3, 5)),
        ("(3,)", (3,)),
        ("()", ()),
        ("[1, [2]]", [1, [2]]),
        ("{'a': 1, 2: None}", {"a": 1, 2: None}),
        ("256*6*6", 9216),
        ("2 + 3 * 4 - 1", 13),
        ("7 // 2", 3),
        ("7 % 4", 3),
        ("1 / 4", 0.25),
        ("2 ** 10", 1024),
        ("-2 ** 2", -4),
        ("torch.float16", Name("torch.float16")),
        ("LayerNorm", Name("LayerNorm")),
        ("package.module:Class", Name("package.module:Class")),
        ("{'norm':LayerNorm}", {"norm": Name("LayerNorm")}),
        ("{True:LayerNorm,None:ReLU}", {True: Name("LayerNorm"), None: Name("ReLU")}),
        ("_", HOLE),
    ],
)
def test_arguments_are_literals_and_names(text: str, value: object) -> None:
    assert parse(f"M({text})") == Call("M", (value,))
    assert parse(f"M(key={text})") == Call("M", (), {"key": value})
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_a_call() -> None:
    assert parse("Linear(4096, 10, bias=False)") == Call("Linear", (4096, 10), {"bias": False})
    assert parse(" nn.Linear( 4096,\n 10 ) ") == Call("nn.Linear", (4096, 10))
    assert parse("my_package.nets:Block(width=3)") == Call("my_package.nets:Block", (), {"width": 3})
    assert parse("ReLU()") == parse("ReLU") == Call("ReLU")


def test_calls_nest() -> None:
    assert parse("Sequential(Linear(20,30), ReLU(), a:B(norm_layer=LayerNorm))") == Call(
        "Sequential",
        (Call("Linear", (20, 30)), Call("ReLU"), Call("a:B", (), {"norm_layer": Name("LayerNorm")})),
    )


def test_holes() -> None:
    assert parse("Linear(_, 10)").has_hole
    assert parse("GroupNorm(32, num_channels=_)").has_hole
    assert not parse("Linear(4096, 10)").has_hole
    assert not parse("Linear('_', 10)").has_hole


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("Linear 4096 10 bias=False", "Linear(4096, 10, bias=False)"),
        ("Linear _ 10", "Linear(_, 10)"),
        ("Conv2d 3 8 1 padding_mode=reflect", "Conv2d(3, 8, 1, padding_mode='reflect')"),
        ("Flatten 1 -1", "Flatten(1, -1)"),
        ("LeakyReLU -0.1", "LeakyReLU(-0.1)"),
        ("Conv2d 3 8 (3,5)", "Conv2d(3, 8, (3, 5))"),
        ("Linear 256*6*6 10 dtype=torch.float16", "Linear(9216, 10, dtype=torch.float16)"),
        ("GELU tanh", "GELU('tanh')"),
        ("M gr\u00f6\u00dfe", "M('gr\u00f6\u00dfe')"),
        ("ReLU", "ReLU()"),
        ("my.nets:Block 3", "my.nets:Block(3)"),
        ("Sequential Linear(20,30) ReLU()", "Sequential(Linear(20,30), ReLU())"),
        ("Linear(4096, 10)", "Linear(4096, 10)"),  # one expression that a shell has split
    ],
)
def test_the_spelling_without_parentheses(words: str, same: str) -> None:
    assert parse_words(words.split(" ")) == parse(same)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no module is given"),
        (["bias=False"], "cannot read 'bias=False'"),
        (["Lin-ear", "3"], "'Lin-ear' is not the name of a module"),
        (["Linear", "in_features=3", "10"], "'10' comes after in_features="),
        (["Linear", "bias=True", "bias=False"], "bias is given twice"),
        (["Linear", "4", "5", "bias="], "bias= has no value"),
        (["Linear", "3*'a'"], "arithmetic needs numbers"),
        (["Linear", "class=3"], r"cannot read 'Linear\(class=3\)'"),
        (["None", "3"], r"'None' is not allowed in 'None\(3\)'"),
        (["Sequential", *["1"] * 2001], "more than 2000 parts"),
    ],
)
def test_errors_in_the_spelling_without_parentheses(words: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_words(words)


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os')",
        "M(__import__('os').system('true'))",
        "M(().__class__)",
        "M(nn.Linear.__init__)",
        "nn.Linear.__init__.__globals__",
        "M(nn.__dict__.x)",
        "M(f'{1}')",
        "M(f'{().__class__}')",
        "M(lambda: 0)",
        "M(lambda x: x)",
        "M([i for i in range(9)])",
        "M({i: i for i in x})",
        "M(i for i in x)",
        "M(x := 1)",
        "M(1 if True else 2)",
        "M(not 1)",
        "M(~1)",
        "M(1 < 2)",
        "M(1 and 2)",
        "M(1 | 2)",
        "M(1 << 2)",
        "M(1 @ 2)",
        "M(a[0])",
        "M(a[1:2])",
        "M(*a)",
        "M(**a)",
        "M([*a])",
        "M({**a})",
        "M({1, 2})",
        "M(1j)",
        "M(b'bytes')",
        "M(...)",
        "M()()",
        "M().x",
        "M(3).x(4)",
        "_(3)",
        "M(_.x)",
        "(await x)",
        "'Linear'(3)",
        "M('a' * 9)",
        "M('a' % 9)",
        "M(True + 1)",
        "M(_ + 1)",
        "M({(1, 2): 3})",
        "M({LayerNorm: 3})",
        "M(1)\nM(2)",
        "M(1); M(2)",
        "import os",
        "M(a=1, a=2)",
        "M(a=1, 2)",
        "a.__colon__.b",
        "M(a . __colon__ . b)",
        "3",
        "_",
        "'text'",
        "",
        "M(",
        "M)",
        "M(\0)",
    ],
)
def test_anything_else_is_refused(code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(code)
    assert caught.value.exit_code == 2
    reasons = (
        "not allowed",
        "cannot read",
        "arithmetic needs numbers",
        "dictionary keys",
        "given twice",
        "not a module",
    )
    assert any(reason in caught.value.message for reason in reasons)


def test_the_error_shows_the_part_that_is_not_a_literal() -> None:
    with pytest.raises(RequestError) as caught:
        parse("Linear(4096, out_features=open('x').read())")
    assert caught.value.message.startswith("\"open('x')\" is not allowed in ")
    assert "nothing in an expression is evaluated" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "text", ["\uff2cinear(1)", "Linear(\uff11)", "M(x\u00e9=1)", "M(\u2160)", "nn.\u017fequential()"]
)
def test_names_are_ascii(text: str) -> None:
    """Python normalises fullwidth letters to ASCII, so a name would not be what the text shows."""
    with pytest.raises(RequestError):
        parse(text)


@pytest.mark.parametrize("newline", ["\n", "\r", "\r\n", "\f"])
def test_strings_may_contain_text_outside_ascii(newline: str) -> None:
    assert parse(f"M({newline}'\u00e9',{newline}'\u6a21')") == Call("M", ("\u00e9", "\u6a21"))
    with pytest.raises(RequestError, match="only strings may have non-ASCII characters"):
        parse(f"M({newline}'\u00e9',{newline}\u00e9)")


@pytest.mark.parametrize(
    ("text", "string"),
    [
        ("'''it's'''", "it's"),
        ("'''x\ny:Z(1), '''", "x\ny:Z(1), "),
        ('"""a"b:c,"""', 'a"b:c,'),
        ("'a\\\nb:c'", "ab:c"),
        ("# it's\n''", ""),
        ("''''''", ""),
    ],
)
def test_the_colon_of_a_class_is_found_behind_any_string(text: str, string: str) -> None:
    assert parse(f"M({text},nets.layers:Own)") == Call("M", (string, Name("nets.layers:Own")))


# --- limits --------------------------------------------------------------------------------------------------------


def test_the_limit_of_text_is_64_kib() -> None:
    fits = f"M('{'x' * (64 * 1024 - 5)}')"
    assert len(fits) == 64 * 1024
    assert parse(fits).args[0] == "x" * (64 * 1024 - 5)
    with pytest.raises(RequestError, match="65537 characters; the limit is 64 KiB"):
        parse(fits + " ")
    with pytest.raises(RequestError, match="the limit is 64 KiB"):
        parse("M('" + "\u6a21" * 22_000 + "')")  # of bytes, not of characters


def test_the_limit_of_depth_is_50() -> None:
    assert parse_value("[" * 50 + "]" * 50) == parse_value("[" * 50 + "]" * 50)
    for text in ("[" * 51 + "]" * 51, "M(" * 50 + "1" + ")" * 50, "M(x=" * 50 + "1" + ")" * 50, "-" * 50 + "1"):
        with pytest.raises(RequestError, match="nested deeper than 50"):
            parse_value(text)
    deep = parse("M(x=" * 49 + "1" + ")" * 49)
    for _ in range(48):
        deep = deep.kwargs["x"]
    assert deep == Call("M", (), {"x": 1})


def test_the_limit_of_parts_is_2000() -> None:
    assert len(parse(f"M({'1,' * 1998})").args) == 1998  # with the call and its name, 2,000
    with pytest.raises(RequestError, match="more than 2000 parts"):
        parse(f"M({'1,' * 1999})")


@pytest.mark.parametrize("text", ["2**63-1", "-2**62", "9223372036854775807", "0x7fffffffffffffff"])
def test_integers_below_2_to_the_63(text: str) -> None:
    if text == "2**63-1":
        with pytest.raises(RequestError, match=r"beyond 2\^63"):  # on the way there
            parse_value(text)
    else:
        assert abs(parse_value(text)) < 2**63


@pytest.mark.parametrize(
    "text",
    [
        "9223372036854775808",
        "-9223372036854775808",
        "-2**62*2",
        "2**63",
        "9**9**9**9",
        "2**-1*2**10000",
        "(2**40)**(2**40)",
        "10**1024",
        "3000000000*4000000000",
        "1e999",
        "1e308*10",
        "2.0**2000",
        "0x" + "f" * 60_000,
    ],
)
def test_larger_integers_are_refused_before_they_are_computed(text: str) -> None:
    start = time.process_time()
    with pytest.raises(RequestError, match=r"beyond 2\^63"):
        parse(f"M({text})")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1/0", "division by zero: '1/0'"),
        ("1%0", "division by zero"),
        ("0**-1", "division by zero"),
        ("(-8)**0.5", "not a real number"),
    ],
)
def test_arithmetic_that_has_no_answer(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("*", r"\*")):
        parse(f"M({text})")


@pytest.mark.parametrize(
    "text",
    [
        "(" * 30_000,
        "[" * 30_000 + "]" * 30_000,
        "M(" * 20_000 + ")" * 20_000,
        "-" * 60_000 + "1",
        "not " * 15_000 + "1",
        "1" + "+1" * 30_000,
        "a" + ".b" * 30_000,
        "a" + "()" * 30_000,
        "a" + "[0]" * 20_000,
        "9" * 60_000,
        "lambda:" * 9_000 + "0",
        "{" * 60_000,
        "f'{" * 20_000,
        "'" * 60_001,
        "M('" + "\\'" * 32_000,
        'M("' + '\\"' * 32_000,
        "'''\\'" * 12_000,
        "\\\n" * 30_000,
    ],
)
def test_hostile_text_ends_in_one_short_message(text: str) -> None:
    start = time.process_time()
    with pytest.raises(RequestError) as caught:
        parse(text)
    assert len(caught.value.message) < 300
    assert time.process_time() - start < 5


@given(st.text(max_size=80) | st.text("MN(),.:_=*[]{}'\"\\-+1 9eE\n#\u00e9", max_size=40))
@settings(max_examples=400, deadline=None)
def test_any_text_is_an_expression_or_a_modelcli_error(text: str) -> None:
    try:
        call = parse(text)
    except RequestError:
        return
    assert parse(str(call)) == call


@pytest.mark.parametrize("text", ["'\ud800'", "M('\udcff')", "M(\udcff)"])
def test_text_that_is_not_unicode_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="cannot read"):
        parse(text)


# --- to text and back ----------------------------------------------------------------------------------------------

identifiers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(
    lambda word: word != "_" and not keyword.iskeyword(word) and not word.startswith("__")
)
dotted = st.lists(identifiers, min_size=1, max_size=3).map(".".join)
class_names = dotted | st.builds("{}:{}".format, dotted, identifiers)
scalars: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)


def _values(below: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(below, max_size=3)
        | st.lists(below, max_size=3).map(tuple)
        | st.dictionaries(scalars, below, max_size=3)
        | st.builds(
            Call, class_names, st.lists(below, max_size=2).map(tuple), st.dictionaries(identifiers, below, max_size=2)
        )
    )


values = st.recursive(scalars | st.just(HOLE) | st.builds(Name, class_names), _values, max_leaves=8)
calls = st.builds(
    Call, class_names, st.lists(values, max_size=3).map(tuple), st.dictionaries(identifiers, values, max_size=3)
)


@given(calls)
def test_words_parse_to_the_same_call(call: Call) -> None:
    words = to_words(call)
    assert words is None or parse_words(words) == call


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Conv2d(3,8,-1,padding_mode='reflect')", "Conv2d 3 8 -1 padding_mode=reflect"),
        ("Conv2d(_,8,1,bias=False)", "Conv2d _ 8 1 bias=False"),
        ("ReLU()", None),
        ("Conv2d(3,8,(1,1))", None),
        ("Sequential(ReLU())", None),
        ("M('1')", None),
        ("M('a b')", None),
    ],
)
def test_expressions_that_can_be_written_without_parentheses(text: str, words: str | None) -> None:
    assert to_words(parse(text)) == (None if words is None else words.split())


@given(calls)
@settings(deadline=None)
def test_text_parses_to_the_same_expression(call: Call) -> None:
    assert parse(to_text(call)) == call
    assert to_text(parse(str(call))) == str(call)


def test_the_canonical_spelling_has_no_spaces() -> None:
    call = parse("Conv2d( 3, 8, (3, 5), bias = False, padding_mode = 'my mode', d = {'a': [1, 2]}, t = (1,) )")
    assert str(call) == "Conv2d(3,8,(3,5),bias=False,padding_mode='my mode',d={'a':[1,2]},t=(1,))"


def test_minus_zero_and_small_numbers_survive() -> None:
    call = parse("M(-0.0, 1e-30)")
    assert math.copysign(1, parse(str(call)).args[0]) == -1
    assert parse(str(call)).args[1] == 1e-30


def test_every_name_in_an_expression_is_found() -> None:
    call = parse("Sequential(a:B(), [torch.float16, {'x': LayerNorm}], act=nn.ReLU(), size=(_, 3))")
    assert list(names_in(call)) == ["Sequential", "a:B", "torch.float16", "LayerNorm", "nn.ReLU"]
