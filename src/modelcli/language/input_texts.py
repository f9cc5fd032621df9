"""The texts that state a model's inputs: `NAME=SHAPE[:DTYPE]` in `--input`, recipes and records."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from modelcli.errors import RequestError, did_you_mean
from modelcli.model.dtypes import INPUT_DTYPES, ITEM_BYTES, dtype_called
from modelcli.model.tensors import Shape

#: The text which states that `forward` takes no input.
NONE = "none"
EXAMPLES = "write input_ids=1,128:int64, batch.image=1,3,8,8, x=scalar, steps==5, or none where forward takes nothing"

_NAME = re.compile(r"(?:[A-Za-z_]\w*|\d{1,4})(?:\.\w+)*", re.ASCII)
_VALUE = re.compile(r"(?P<name>[\w.]*)==(?P<value>.*)", re.ASCII | re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None, "null": None}

Value = bool | int | float | str | None


@dataclass(frozen=True)
class InputText:
    """One input of `forward`: a tensor given by its shape, or another value (a number, a bool, None, a string).

    Attributes:
        path: the name or position of the argument of `forward`, and the keys and indices into it; empty if the text
            names none, which means the next free position.
        shape: the shape of the tensor; None if the input is not a tensor.
        dtype: the dtype of the tensor; None if the text states none.
        value: the value of an input that is not a tensor.
    """

    path: tuple[str, ...]
    shape: Shape | None
    dtype: str | None = None
    value: Value = None

    def __str__(self) -> str:
        name = ".".join(self.path)
        if self.shape is None:
            return f"{name}=={self.value!r}"
        shape = ",".join(map(str, self.shape)) or "scalar"
        return (f"{name}={shape}" if name else shape) + (f":{self.dtype}" if self.dtype else "")


def parse_all(texts: Sequence[str]) -> tuple[InputText, ...]:
    """Parse all inputs; `none` alone means no input. Raises RequestError for a text that is not an input."""
    if NONE in texts:
        if len(texts) > 1:
            raise RequestError("--input none says that forward takes nothing, and another input is given")
        return ()
    return tuple(map(parse, texts))


def numbered(inputs: Sequence[InputText], start: int = 0) -> Iterator[InputText]:
    """Yield the inputs, and give each one without a name the next position that no other input states.

    Positions start at `start`.
    """
    stated = {item.path[0] for item in inputs if item.path}
    free = (str(position) for position in count(start) if str(position) not in stated)
    for item in inputs:
        yield item if item.path else replace(item, path=(next(free),))


def parse(text: str) -> InputText:
    """Parse one input. Raises RequestError for a text that is not an input.

    `NAME=SHAPE[:DTYPE]` is a tensor; the shape `scalar` or `()` has no dimensions. `NAME==VALUE` is a number, True,
    False, None, or a string. An input without `NAME=` takes the next position.
    """
    text = text.strip()
    if (match := _VALUE.fullmatch(text)) is not None:
        return InputText(_path(match["name"], text), None, value=_value(match["value"].strip()))
    name, equals, rest = text.rpartition("=")
    shape_text, _, dtype = rest.partition(":")
    path = _path(name, text) if equals else ()
    return InputText(path, _shape(shape_text.strip(), text), dtype_of_input(dtype.strip()) if dtype.strip() else None)


def _path(name: str, text: str) -> tuple[str, ...]:
    name = name.strip()
    if not name:
        return ()
    if not _NAME.fullmatch(name):
        raise RequestError(f"input {text!r}: {name!r} is not the name of an argument", EXAMPLES)
    return tuple(name.split("."))


def _shape(text: str, whole: str) -> Shape:
    from modelcli.language.references import parse_input_size

    if text.replace(" ", "") in ("scalar", "()", "[]"):
        return ()
    try:
        return parse_input_size(text)
    except RequestError:
        raise RequestError(f"input {whole!r}: {text!r} is not a shape", EXAMPLES) from None


def dtype_of_input(text: str) -> str:
    """Return torch's name of an input dtype from any of its usual names (`long`, `bf16`). Raises RequestError."""
    name = dtype_called(text)
    if name not in ITEM_BYTES:
        raise RequestError(f"no dtype {name!r}", did_you_mean(name, INPUT_DTYPES) or "float32, bfloat16, int64")
    if name not in INPUT_DTYPES:
        kind = "quantized" if name.startswith("q") else "packed"
        raise RequestError(f"an input cannot have the {kind} dtype {name}", "float32, bfloat16 or int64")
    return name


def _value(text: str) -> Value:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text
