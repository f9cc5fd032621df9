"""Edits: one surgical operation each, as a frozen dataclass and as one line of text.

`parse("replace classifier.6 Linear(4096,10)")` gives a `Replace`; `str(edit)` gives the line back. A line has the
words and options of the command, split as a POSIX shell splits them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from modelcli.errors import RequestError, did_you_mean
from modelcli.language import expressions, selectors
from modelcli.language.expressions import Call, Name
from modelcli.language.quoting import quoted
from modelcli.model.dtypes import FLOATING, dtype_called
from modelcli.wording import listed


def _option(flag: str, kind: str, default: Any) -> Any:
    """A field that is an option: `kind` is how its word is read, `flag` its name on a command line."""
    return field(default=default, metadata={"option": flag, "kind": kind})


@dataclass(frozen=True)
class Edit:
    """One surgical operation. Fields with an `option` in their metadata are options, the others operands."""

    name: ClassVar[str]

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        """The edit with these words for operands. Raises RequestError where they are too few, or cannot be read."""
        raise NotImplementedError

    def operands(self) -> list[str]:
        """The words after the edit's name, without the options."""
        raise NotImplementedError

    @classmethod
    def options(cls) -> dict[str, Field[Any]]:
        """The fields that are options, by their names on a command line."""
        return {item.metadata["option"]: item for item in fields(cls) if "option" in item.metadata}

    def __str__(self) -> str:
        operands, options = self.operands(), []
        for flag, item in self.options().items():
            options += _words_of(flag, item.metadata["kind"], getattr(self, item.name))
        words = [*options, "--", *operands] if any(map(_looks_like_option, operands)) else [*operands, *options]
        return " ".join(map(_quoted, [self.name, *words]))


@dataclass(frozen=True, kw_only=True)
class Selecting(Edit):
    """An edit of what selectors pick: less what others pick, and only where so many match."""

    without: tuple[str, ...] = _option("--except", "selectors", ())
    expect: int | None = _option("--expect", "number", None)


@dataclass(frozen=True, kw_only=True)
class Replace(Selecting):
    """Put a new module in place of every match.

    `also` are further targets, such as the other names of a shared module; `keep_weights` carries over the overlapping
    part of each tensor that means the same in both modules; `untie` replaces a shared module under the names picked
    alone.
    """

    name: ClassVar[str] = "replace"
    target: str
    module: Call
    also: tuple[str, ...] = _option("--also", "selectors", ())
    keep_weights: bool = _option("--keep-weights", "flag", False)
    untie: bool = _option("--untie", "flag", False)

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("replace takes a target and a module", "replace classifier.6 'Linear(4096,10)'")
        _refuse_swapped(cls.name, words)
        _refuse_several(f"{cls.name} takes one target", words)
        return cls(target=_selector(words[0]), module=expressions.parse_words(words[1:]))

    @property
    def targets(self) -> tuple[str, ...]:
        """All selectors of what is replaced."""
        return (self.target, *self.also)

    def operands(self) -> list[str]:
        return [self.target, expressions.to_text(self.module)]


@dataclass(frozen=True, kw_only=True)
class _Placing(Edit):
    """An edit that puts one new module at one path."""

    example: ClassVar[str]
    path: str
    module: Call

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError(f"{cls.name} takes a path and a module", f"{cls.name} {cls.example}")
        _refuse_swapped(cls.name, words)
        _refuse_several(f"{cls.name} takes one path", words)
        return cls(path=_selector(words[0]), module=expressions.parse_words(words[1:]))

    def operands(self) -> list[str]:
        return [self.path, expressions.to_text(self.module)]

    def example_line(self) -> str:
        """How such an edit is written."""
        return f"{self.name} {self.example}"


@dataclass(frozen=True, kw_only=True)
class Add(_Placing):
    """Add a child with a name of its own: `path` is where it will be, and nothing is there yet."""

    name: ClassVar[str] = "add"
    example: ClassVar[str] = "classifier.dropout 'Dropout(0.5)'"


@dataclass(frozen=True, kw_only=True)
class Insert(_Placing):
    """Insert before a position of a sequence whose children are `0..n-1`; the later ones move up.

    `renumber` says that the numbered children of a bare checkpoint are such a sequence.
    """

    name: ClassVar[str] = "insert"
    example: ClassVar[str] = "features.1 'BatchNorm2d(64)'"
    renumber: bool = _option("--renumber", "flag", False)


@dataclass(frozen=True, kw_only=True)
class Append(_Placing):
    """Add at the end of the sequence at `path`."""

    name: ClassVar[str] = "append"
    example: ClassVar[str] = "classifier 'Softmax(dim=1)'"


@dataclass(frozen=True, kw_only=True)
class _OfTargets(Selecting):
    """An edit of one or more targets."""

    example: ClassVar[str]
    targets: tuple[str, ...]

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if not words:
            raise RequestError(f"{cls.name} takes at least one target", f"{cls.name} {cls.example}")
        return cls(targets=tuple(map(_selector, words)))

    def operands(self) -> list[str]:
        return list(self.targets)


@dataclass(frozen=True, kw_only=True)
class Remove(_OfTargets):
    """Take modules out; in a sequence whose children are `0..n-1` the later ones move down.

    `renumber` says that the numbered children of a bare checkpoint are such a sequence.
    """

    name: ClassVar[str] = "remove"
    example: ClassVar[str] = "classifier.6"
    renumber: bool = _option("--renumber", "flag", False)


@dataclass(frozen=True, kw_only=True)
class Freeze(_OfTargets):
    """Set `requires_grad` of the parameters that match to False."""

    name: ClassVar[str] = "freeze"
    example: ClassVar[str] = "features"


@dataclass(frozen=True, kw_only=True)
class Unfreeze(_OfTargets):
    """Set `requires_grad` of the parameters that match to True."""

    name: ClassVar[str] = "unfreeze"
    example: ClassVar[str] = "classifier"


@dataclass(frozen=True, kw_only=True)
class Init(Selecting):
    """Draw the numbers of what matches anew: weights by `scheme`, biases by `bias`."""

    name: ClassVar[str] = "init"
    targets: tuple[str, ...]
    scheme: Call
    bias: Call = _option("--bias", "scheme", Call("zeros"))

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("init takes at least one target and a scheme", "init '**:Conv2d' xavier_uniform")
        if (scheme := _scheme_in_pieces(words)) is not None:
            raise RequestError(f"{words[-1]!r} is no scheme, but an argument of one", f"write it as {scheme!r}")
        hint = "the scheme comes last: init '**:Conv2d' xavier_uniform, or 'normal(0, 0.01)'"
        return cls(targets=tuple(map(_selector, words[:-1])), scheme=_scheme(words[-1], hint))

    def operands(self) -> list[str]:
        return [*self.targets, expressions.to_text(self.scheme).removesuffix("()")]


@dataclass(frozen=True, kw_only=True)
class Cast(Selecting):
    """Convert the floating-point tensors of what matches to another dtype."""

    name: ClassVar[str] = "cast"
    targets: tuple[str, ...]
    dtype: str

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("cast takes at least one target and a dtype", "cast . bfloat16")
        dtype = dtype_called(words[-1])
        if dtype not in FLOATING:
            near = did_you_mean(dtype, FLOATING) or "one of float32, bfloat16, float16, float64"
            raise RequestError(f"{words[-1]!r} is no floating-point dtype", near)
        return cls(targets=tuple(map(_selector, words[:-1])), dtype=dtype)

    def operands(self) -> list[str]:
        return [*self.targets, self.dtype]


@dataclass(frozen=True, kw_only=True)
class Extract(Edit):
    """Let the submodule at `path` be the model."""

    name: ClassVar[str] = "extract"
    path: str

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) != 1:
            raise RequestError("extract takes one path", "extract features")
        return cls(path=_selector(words[0]))

    def operands(self) -> list[str]:
        return [self.path]


@dataclass(frozen=True, kw_only=True)
class Rename(Edit):
    """Rename tensor keys: what the wildcards of `old` capture, those of `new` put back in the same order.

    Where there are several ways to share a name out, the first wildcard takes as much as it can, then the second.
    """

    name: ClassVar[str] = "rename"
    old: str
    new: str

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) != 2:
            raise RequestError("rename takes an old and a new name", "rename 'module.**' '**'")
        return cls(old=_selector(words[0]), new=_selector(words[1]))

    def operands(self) -> list[str]:
        return [self.old, self.new]


#: Every edit by its name.
REGISTRY: Mapping[str, type[Edit]] = {
    kind.name: kind for kind in (Replace, Add, Insert, Append, Remove, Extract, Rename, Freeze, Unfreeze, Init, Cast)
}


def parse(line: str) -> Edit:
    """Read one line. Raises RequestError that says which word is wrong."""
    words = split(line)
    if not words:
        raise RequestError("an empty edit", f"an edit is one of {', '.join(REGISTRY)}")
    return from_words(words[0], words[1:])


#: What a word is made of for a POSIX shell: plain characters, quoted ones, and those behind a backslash.
_PIECE = r"""[^ \t\r\n'"\\]+|'[^']*'|"(?:[^"\\]|\\.)*"|\\."""
_PIECES = re.compile(_PIECE, re.DOTALL)
#: It always matches, and so never tries again. A # where a word could begin starts a comment.
_WORD = re.compile(rf"(?:[ \t\r\n]+|#[^\r\n]*)*((?:{_PIECE})*)", re.DOTALL)


def split(line: str) -> list[str]:
    """The words of a POSIX shell, in time that grows with the line: a word that starts with `#` starts a comment.

    Raises RequestError for a quote without an end.
    """
    words, position = [], 0
    while match := _WORD.match(line, position):
        position = match.end()
        if not match[1]:
            break
        words.append(_PIECES.sub(lambda piece: _unquoted(piece[0]), match[1]))
    if position < len(line):
        what = "No escaped character" if line[position] == "\\" else "No closing quotation"
        raise RequestError(f"cannot split {line!r} into words: {what}")
    return words


def _unquoted(piece: str) -> str:
    match piece[0]:
        case "'":
            return piece[1:-1]
        case '"':
            return re.sub(r'\\(["\\])', r"\1", piece[1:-1])
        case "\\":
            return piece[1:]
    return piece


def parse_all(lines: Iterable[tuple[str, object]]) -> list[Edit]:
    """Read many lines, each with the place where it stands: `head.toml:5`. What is an edit already stays as it is.

    Raises one RequestError that names every line that is wrong.
    """
    made: list[Edit] = []
    problems = []
    for place, line in lines:
        try:
            if not isinstance(line, str | Edit):
                raise RequestError(f"an edit is a line of text, not {line!r}")
            made.append(parse(line) if isinstance(line, str) else line)
        except RequestError as error:
            problems.append(f"{place}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    if problems:
        raise RequestError("\n".join(problems))
    return made


def from_words(name: str, words: Sequence[str]) -> Edit:
    """Make an edit of its name and the words after it, options included."""
    kind = REGISTRY.get(name)
    if kind is None:
        raise RequestError(
            f"no such edit: {name!r}",
            did_you_mean(name, REGISTRY) or f"an edit is one of {', '.join(REGISTRY)}",
        )
    options = kind.options()
    operands: list[str] = []
    given: dict[str, Any] = {}
    several: dict[str, list[Any]] = {}
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if word == "--":
            operands += rest
            break
        flag, equals, value = word.partition("=")
        item = options.get(flag)
        if item is None:
            operands.append(checked_operand(word, tuple(options)))
        elif item.metadata["kind"] == "flag":
            if equals:
                raise RequestError(f"{flag} takes no value")
            given[item.name] = True
        else:
            if not equals:
                if not rest:
                    raise RequestError(f"{flag} takes a value")
                value = rest.popleft()
            read = _value_of(flag, item.metadata["kind"], value)
            if isinstance(item.default, tuple):
                several.setdefault(item.name, []).append(read)
            else:
                given[item.name] = read
    given.update((key, tuple(read)) for key, read in several.items())
    return replace(kind.from_operands(operands), **given)


def _value_of(flag: str, kind: str, word: str) -> Any:
    """The value of an option, from its word."""
    match kind:
        case "selectors":
            return _selector(word)
        case "scheme":
            return _scheme(word, f"{flag} takes a scheme: ones, or 'normal(0, 0.01)'")
    if not re.fullmatch(r"\d{1,9}", word, re.ASCII):
        raise RequestError(f"{flag} takes a number, not {word!r}")
    return int(word)


def _words_of(flag: str, kind: str, value: Any) -> list[str]:
    """The words that give an option this value; none where it is the default."""
    match kind:
        case "selectors":
            return [word for selector in value for word in (flag, selector)]
        case "flag":
            return [flag] if value else []
        case "scheme":
            return [] if value == Call("zeros") else [flag, expressions.to_text(value).removesuffix("()")]
    return [] if value is None else [flag, str(value)]


def _refuse_swapped(name: str, words: Sequence[str]) -> None:
    """Refuse a module before its place: `replace 'Linear(1,2)' classifier.6`."""
    if len(words) == 2 and "(" in words[0] and "(" not in words[1] and expressions.is_expression(words[0]):
        raise RequestError(
            f"{name} takes the place before the module, and {words[0]!r} is a module",
            f"{name} {quoted(words[1])} {quoted(words[0])}",
        )


def _refuse_several(taken: str, words: Sequence[str]) -> None:
    """Refuse more modules than one: `replace fc 'Linear(_,3)' 'Linear(3,4)'`."""
    given = words[1:]
    if len(given) > 1 and all("(" in word and expressions.is_expression(word) for word in given):
        one = quoted(f"Sequential({', '.join(given)})")
        raise RequestError(
            f"{taken} and one module, not {len(given)} modules: {listed(given, 3)}", f"several go in as one: {one}"
        )


def _scheme_in_pieces(words: Sequence[str]) -> str | None:
    """The scheme whose name and arguments are words of their own: `normal(std=0.01)` of `fc normal std=0.01`."""
    first = next((place for place in range(len(words), 0, -1) if not _is_argument(words[place - 1])), 0)
    if first < 2 or first == len(words) or not words[first - 1].isidentifier():
        return None
    return f"{words[first - 1]}({', '.join(words[first:])})"


def _is_argument(word: str) -> bool:
    """Whether a word is a number, or a value by its name: `0.01`, `std=0.01`."""
    return re.fullmatch(r"([A-Za-z_]\w*=.+|[-+]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)", word, re.ASCII) is not None


def _scheme(word: str, hint: str) -> Call:
    """A scheme of its word. A bare word among its arguments is text: no function of `torch.nn.init` takes a class."""
    call = expressions.parse(word, kind="a scheme", hint=hint)
    return Call(call.name, tuple(map(_text, call.args)), {key: _text(value) for key, value in call.kwargs.items()})


def _text(value: Any) -> Any:
    return value.dotted if isinstance(value, Name) and value.dotted.isidentifier() else value


def _selector(word: str) -> str:
    selectors.parse(word)
    return word


def checked_operand(word: str, options: Sequence[str] = ("--except", "--expect")) -> str:
    """A word that is no option: negative numbers are operands, anything else with a dash in front is a mistake."""
    if _looks_like_option(word):
        raise RequestError(f"no such option: {word}", did_you_mean(word, options))
    return word


def _looks_like_option(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word, re.ASCII)


def _quoted(word: str) -> str:
    """The word for a shell, quotes only where they are needed: `"Conv2d(3,8,1,padding_mode='reflect')"`."""
    # Brackets and stars stay: it is a line of a recipe first. What a shell runs does not.
    if re.fullmatch(r"[^\s'\"\\#=$`;&|<>!~][^\s'\"\\$`;&|<>!]*", word):
        return word
    return quoted(word)
