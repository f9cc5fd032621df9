"""Module expressions such as `Linear(4096, _)`, as plain data. `ast` parses the text; nothing is ever evaluated.

A value is None, a bool, int, float or str, a tuple, list or dict of values, a `Name` (a class or a dtype), a `Call`,
or `HOLE` (`_`: keep the old argument).
"""

from __future__ import annotations

import ast
import contextlib
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from modelcli.errors import RequestError
from modelcli.language.quoting import quoted

MAX_BYTES = 64 * 1024
MAX_DEPTH = 50
MAX_NODES = 2_000
MAX_INTEGER = 2**63 - 1

Value = Any


@dataclass(frozen=True, slots=True)
class Name:
    """A name that stands for a class (`LayerNorm`, `package.module:Class`) or a dtype (`torch.float16`)."""

    dotted: str


@dataclass(frozen=True, slots=True)
class Hole:
    """`_`: keep the old argument."""


HOLE: Final = Hole()


@dataclass(frozen=True)
class Call:
    """`name(*args, **kwargs)`, with every value as plain data."""

    name: str
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        return to_text(self)

    @property
    def has_hole(self) -> bool:
        """Whether the call contains `_`, in nested calls too."""
        return holds_hole(self)


#: The hint for a text that should be a module expression and is not.
_WRITE_MODULE = "write Linear(4096, 10)"


def parse(text: str, *, kind: str = "a module expression", hint: str = _WRITE_MODULE) -> Call:
    """Parse `Name(arguments)`, or `Name` alone for a call without arguments.

    Args:
        text: the expression.
        kind: what the text should be, for the error message.
        hint: the hint of the error.

    Raises:
        RequestError: the text contains something other than literals, names and calls, or exceeds a limit. The
            message shows the part.
    """
    value = parse_value(text, hint=hint)
    if isinstance(value, Name):
        return Call(value.dotted)
    if not isinstance(value, Call):
        raise RequestError(f"{_cut(text)!r} is not {kind}", hint)
    return value


def parse_named(text: str) -> Call:
    """Parse `NAME` or `NAME(arguments)`; the name may be any text without parentheses: `org/name@main(classes=3)`.

    Raises RequestError for a name that is empty or not printable, and as `parse` does for the arguments.
    """
    name, parenthesis, rest = text.strip().partition("(")
    name = name.strip()
    if not name or not name.isprintable() or ")" in name:
        raise RequestError(f"{_cut(text)!r} does not begin with the name of a model", "write NAME or NAME(arguments)")
    if not parenthesis:
        return Call(name)
    call = parse(f"model({rest}", kind="a name with its arguments in parentheses", hint="write NAME(argument=1)")
    if call.name != "model":
        raise RequestError(f"{_cut(text)!r} is more than a name with its arguments", "write NAME(argument=1)")
    return Call(name, call.args, call.kwargs)


def parse_value(text: str, *, hint: str = _WRITE_MODULE) -> Value:
    """Parse any value: a literal, a name, a call or `_`. Raises RequestError as `parse` does."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RequestError(f"the expression has {len(text)} characters; the limit is {MAX_BYTES // 1024} KiB")
    text = text.strip().replace("\r\n", "\n").replace("\r", "\n")  # Python's own line endings
    if _COLON_NAME in text:
        raise RequestError(f"names with double underscores are not allowed: {text[:80]!r}")
    text = _colons_marked(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError) as error:
        detail = error.msg if isinstance(error, SyntaxError) else str(error)
        if "integer string conversion" in detail:
            raise _too_large(text) from None
        raise RequestError(f"cannot read {_cut(text)!r}: {detail}", hint) from None
    except (RecursionError, MemoryError):
        raise _too_deep(text) from None
    _check_limits(tree.body, text)
    return _convert(tree.body, text)


#: Replaces the colon of `package.module:Class` while `ast` parses the text: a Python name cannot contain a colon.
_COLON_NAME = "__colon__"
_COLON = f".{_COLON_NAME}."
#: A Python string; an unclosed one extends to the end of its line or of the text. The quantifiers are possessive, so a
#: text full of quotes takes linear time.
_STRING = "|".join(
    rf"{q}{q}{q}(?:[^{q}\\]|\\.|{q}(?!{q}{q}))*+(?:{q}{q}{q})?|{q}(?:[^{q}\\\n]|\\.)*+{q}?" for q in ("'", '"')
)
_COLONED = re.compile(
    rf"{_STRING}|(?<![\w.])(?!(?:True|False|None):)([A-Za-z_][\w.]*):([A-Za-z_]\w*)(?=\s*(?:[(,)\]}}]|$))",
    re.ASCII | re.DOTALL,
)


def _colons_marked(text: str) -> str:
    return _COLONED.sub(lambda match: f"{match[1]}{_COLON}{match[2]}" if match[1] else match[0], text)


def parse_words(words: Sequence[str]) -> Call:
    """Parse the words of a command line: one expression, or a call written without parentheses.

    `["Linear", "4096", "10", "bias=False"]` means `Linear(4096, 10, bias=False)`. In this form a word that is not
    another value is a string. Raises RequestError as `parse` does.
    """
    if not words:
        raise RequestError("no module is given", "write Linear(4096,10), or Linear 4096 10")
    head, *rest = words
    if "(" in head or not rest:
        return _parse_joined(words)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:[A-Za-z_]\w*)?", head, re.ASCII):
        raise RequestError(
            f"{_cut(head)!r} is not the name of a module",
            "write Linear 4096 10; if this is a file, the shell may have expanded the target: quote it",
        )
    args: list[Value] = []
    kwargs: dict[str, Value] = {}
    for word in rest:
        match = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", word, re.ASCII | re.DOTALL)
        if match:
            if match[1] in kwargs:
                raise RequestError(f"{match[1]} is given twice")
            if not match[2]:
                raise RequestError(
                    f"{match[1]}= has no value", f"{match[1]}=None, {match[1]}=True, or {match[1]}=_ for what it was"
                )
            kwargs[match[1]] = word_value(match[2])
        elif kwargs:
            raise RequestError(f"{_cut(word)!r} comes after {next(iter(kwargs))}=: positional arguments come first")
        else:
            args.append(word_value(word))
    # Parsing the whole text applies the limits to all the words together, and refuses Python keywords as names.
    return parse(to_text(Call(head, tuple(args), kwargs)))


def _parse_joined(words: Sequence[str]) -> Call:
    """Parse one expression that the shell, or a recipe line, has split at its spaces."""
    try:
        return parse(" ".join(words))
    except RequestError:
        if len(words) > 1 and is_expression(words[0]):
            raise RequestError(
                f"{_cut(words[1])!r} comes after the module {_cut(words[0])}",
                f"a model is named with -m {quoted(words[1])}",
            ) from None
        raise


def is_expression(text: str) -> bool:
    """Whether a text can be read as a module expression."""
    try:
        parse(text)
    except RequestError:
        return False
    return True


def word_value(word: str) -> Value:
    """Parse the value in a word of a command line; what is no other value is a string. Raises RequestError."""
    if not word.isascii():
        return word
    value = parse_value(word) if word else ""
    return value.dotted if isinstance(value, Name) and "." not in value.dotted else value


def _check_limits(tree: ast.expr, text: str) -> None:
    level: list[ast.expr] = [tree]
    nodes = depth = 0
    strings: list[ast.Constant] = []
    while level:
        depth += 1
        nodes += len(level)
        strings += [node for node in level if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        if depth > MAX_DEPTH:
            raise _too_deep(text)
        if nodes > MAX_NODES:
            raise RequestError(f"the expression has more than {MAX_NODES} parts: {_cut(text)!r}")
        level = [child for node in level for child in _parts(node)]
    if not text.isascii():
        _require_ascii_names(text, strings)


def _parts(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions directly below a node, without the helper nodes that `ast` puts between them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        else:
            yield from _parts(child)


def _require_ascii_names(text: str, strings: list[ast.Constant]) -> None:
    """Refuse non-ASCII characters outside strings, because Python normalises some of them into other names."""
    data = bytearray(text.encode())
    starts = [0]
    for line in text.encode().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    for node in strings:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        data[start:end] = b"s" * (end - start)
    if not bytes(data).isascii():
        raise RequestError(f"only strings may have non-ASCII characters in a module expression: {_cut(text)!r}")


def _too_deep(text: str) -> RequestError:
    return RequestError(f"the expression is nested deeper than {MAX_DEPTH}: {_cut(text)!r}")


#: How other languages spell Python's constants. Read as a string, `bias=false` would be true.
_PYTHON_CONSTANTS = {"true": "True", "false": "False", "none": "None", "null": "None"}


def _convert(node: ast.expr, text: str) -> Value:
    match node:
        case ast.Constant(value=str() as value):
            return value.replace(_COLON, ":")
        case ast.Constant(value=bool() | None as value):
            return value
        case ast.Constant(value=int() | float() as value):
            return _checked(value, text)
        case ast.Name(id="_"):
            return HOLE
        case ast.Name(id=word) if word in _PYTHON_CONSTANTS:
            raise RequestError(
                f"{word} is not a Python value in {_cut(text)!r}", f"did you mean {_PYTHON_CONSTANTS[word]}?"
            )
        case ast.Name() | ast.Attribute():
            return Name(_dotted(node, text).replace(_COLON, ":"))
        case ast.Tuple(elts=elements):
            return tuple(_convert(element, text) for element in elements)
        case ast.List(elts=elements):
            return [_convert(element, text) for element in elements]
        case ast.Dict(keys=keys, values=values):
            pairs = [(key, value) for key, value in zip(keys, values, strict=True)]
            if any(key is None for key, _ in pairs):
                raise _refused(node, text)
            converted = [(_convert(key, text), _convert(value, text)) for key, value in pairs if key]
            if any(not isinstance(key, str | int | float | bool | None) for key, _ in converted):
                raise RequestError(f"dictionary keys must be strings or numbers: {_segment(node, text)}")
            return dict(converted)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            number = _number(operand, text)
            return _checked(-number if isinstance(sign, ast.USub) else number, text)
        case ast.BinOp(left=left, op=operation, right=right):
            return _arithmetic(operation, _number(left, text), _number(right, text), node, text)
        case ast.Call(func=func, args=args, keywords=keywords):
            if any(isinstance(arg, ast.Starred) for arg in args) or any(word.arg is None for word in keywords):
                raise _refused(node, text)
            names = [word.arg or "" for word in keywords]
            if repeated := next((name for name in names if names.count(name) > 1), None):
                raise RequestError(f"{repeated} is given twice in {_segment(node, text)}")
            return Call(
                _dotted(func, text).replace(_COLON, ":"),
                tuple(_convert(arg, text) for arg in args),
                {name: _convert(word.value, text) for name, word in zip(names, keywords, strict=True)},
            )
        case _:
            raise _refused(node, text)


def _dotted(node: ast.expr, text: str) -> str:
    match node:
        case ast.Name(id=name) if name != "_" and not _is_special(name):
            return name
        case ast.Attribute(value=value, attr=attribute) if not _is_special(attribute):
            return f"{_dotted(value, text)}.{attribute}"
    raise _refused(node, text)


def _is_special(name: str) -> bool:
    """Whether a name is like `__class__`, which leads from a class to the interpreter; no module has such a name."""
    return name.startswith("__") and name.endswith("__") and name != _COLON_NAME


def _number(node: ast.expr, text: str) -> int | float:
    value = _convert(node, text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"arithmetic needs numbers: {_segment(node, text)} in {_cut(text)!r}")
    return value


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _arithmetic(
    operation: ast.operator, left: int | float, right: int | float, node: ast.expr, text: str
) -> int | float:
    function = _OPERATORS.get(type(operation))
    if function is None:
        raise _refused(node, text)
    if isinstance(operation, ast.Pow) and abs(left) > 1 and abs(right) > 1024:
        raise _too_large(text)
    try:
        result = function(left, right)
    except ZeroDivisionError:
        raise RequestError(f"division by zero: {_segment(node, text)}") from None
    except OverflowError:
        raise _too_large(text) from None
    if isinstance(result, complex):
        raise RequestError(f"{_segment(node, text)} is not a real number")
    number: int | float = _checked(result, text)
    return number


def _checked(value: Any, text: str) -> Any:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise _too_large(text)
    if isinstance(value, float) and not math.isfinite(value):
        raise _too_large(text)
    return value


def _too_large(text: str) -> RequestError:
    return RequestError(f"a number is too large (beyond 2^63) in {_cut(text)!r}")


def _refused(node: ast.expr, text: str) -> RequestError:
    return RequestError(
        f"{_segment(node, text)} is not allowed in {_cut(text)!r}: arguments must be literals, names or modules",
        "nothing in an expression is evaluated; write the value itself",
    )


def _segment(node: ast.expr, text: str) -> str:
    return repr(_cut(ast.get_source_segment(text, node) or ""))


def _cut(text: str) -> str:
    text = text.replace(_COLON, ":")
    return text if len(text) <= 80 else text[:77] + "..."


def to_text(value: Value) -> str:
    """Return the canonical text, which has no spaces outside strings: `Linear(4096,10,bias=False)`."""
    match value:
        case Call(name=name, args=args, kwargs=kwargs):
            parts = [to_text(arg) for arg in args] + [f"{key}={to_text(arg)}" for key, arg in kwargs.items()]
            return f"{name}({','.join(parts)})"
        case Name(dotted=dotted):
            return dotted
        case Hole():
            return "_"
        case tuple():
            return "(" + ",".join(map(to_text, value)) + ("," if len(value) == 1 else "") + ")"
        case list():
            return "[" + ",".join(map(to_text, value)) + "]"
        case dict():
            return "{" + ",".join(f"{to_text(key)}:{to_text(item)}" for key, item in value.items()) + "}"
        case _:
            return repr(value)


def to_words(call: Call) -> list[str] | None:
    """Return the words from which `parse_words` makes this call, or None if it needs parentheses or quotes."""
    named = (f"{key}={_word(value)}" for key, value in call.kwargs.items())
    words = [call.name, *map(_word, call.args), *named]
    plain = all(re.fullmatch(r"[\w.:=+-]+", word, re.ASCII) for word in words)
    with contextlib.suppress(RequestError):
        if plain and len(words) > 1 and parse_words(words) == call:
            return words
    return None


def _word(value: Value) -> str:
    return value if isinstance(value, str) else to_text(value)


def holds_hole(value: Value) -> bool:
    """Whether a value contains `_`, in nested values too."""
    match value:
        case Hole():
            return True
        case Call(args=args, kwargs=kwargs):
            return any(map(holds_hole, (*args, *kwargs.values())))
        case tuple() | list():
            return any(map(holds_hole, value))
        case dict():
            return any(map(holds_hole, value.values()))
        case _:
            return False


def holes_in(value: Value) -> int:
    """Return how many times a value contains `_`, in nested values too."""
    match value:
        case Hole():
            return 1
        case Call(args=args, kwargs=kwargs):
            return sum(map(holes_in, (*args, *kwargs.values())))
        case tuple() | list():
            return sum(map(holes_in, value))
        case dict():
            return sum(map(holes_in, value.values()))
        case _:
            return 0


def gives(call: Call, argument: str) -> bool:
    """Whether the call, or a call nested in it, passes the keyword argument `argument`."""
    nested = (item for item in (*call.args, *call.kwargs.values()) if isinstance(item, Call))
    return argument in call.kwargs or any(gives(item, argument) for item in nested)


def names_in(value: Value) -> Iterator[str]:
    """Yield the name of every class and dtype in a value, including the names of calls."""
    match value:
        case Call(name=name, args=args, kwargs=kwargs):
            yield name
            for item in (*args, *kwargs.values()):
                yield from names_in(item)
        case Name(dotted=dotted):
            yield dotted
        case tuple() | list():
            for item in value:
                yield from names_in(item)
        case dict():
            for item in value.values():
                yield from names_in(item)
