"""init: initialise parameters with a function of `torch.nn.init`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from modelcli.edits.declaring import SCHEMES, TENSORS, Kind, Operand, option, selector
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError
from modelcli.language import expressions
from modelcli.language.expressions import Call, Name


def _scheme(word: str, hint: str) -> Call:
    """Parse a scheme. A bare word among its arguments is text: no function of `torch.nn.init` takes a class."""
    call = expressions.parse(word, kind="a scheme", hint=hint)
    return Call(call.name, tuple(map(_text, call.args)), {key: _text(value) for key, value in call.kwargs.items()})


def _text(value: Any) -> Any:
    return value.dotted if isinstance(value, Name) and value.dotted.isidentifier() else value


def _written(scheme: Call) -> str:
    return expressions.to_text(scheme).removesuffix("()")


_SCHEME = Kind(lambda flag, word: _scheme(word, f"{flag} takes a scheme: ones, or 'normal(0, 0.01)'"), text=_written)


@dataclass(frozen=True, kw_only=True)
class Init(Selecting):
    """Initialise the matching parameters again: weights by `scheme`, biases by `bias`."""

    targets: tuple[str, ...]
    scheme: Call
    bias: Call = option(
        "--bias",
        _SCHEME,
        Call("zeros"),
        "The scheme for biases.",
        metavar="SCHEME",
        shown_default="zeros",
        completes=(SCHEMES,),
    )

    name: ClassVar[str] = "init"
    summary: ClassVar[str] = "Re-initialise modules or tensors."
    effect: ClassVar[str] = (
        "re-initialises by any function of `torch.nn.init`, or by `default`, the module's own "
        "`reset_parameters`. `--bias` initialises biases (zeros by default); normalisation layers get weight 1 "
        "and bias 0 unless a target selects only them"
    )
    in_pytorch: ClassVar[str] = "`init.xavier_uniform_(...)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli init '**:Conv2d' xavier_uniform -m squeezenet1_1 -o fresh.pth",
        "modelcli init '**:Linear' 'normal(0, 0.01)' --bias zeros -m alexnet",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Selectors, then the scheme: xavier_uniform, 'normal(0, 0.01)', default.",
            "TARGET... SCHEME",
            several=True,
            completes=(TENSORS,),
            completes_later=(TENSORS, SCHEMES),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("reset", "initialize", "initialise")
    handler: ClassVar[str] = "modelcli.live.surgery.init"
    can_break_fit: ClassVar[bool] = False
    changes_values_only: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("init takes at least one target and a scheme", "init '**:Conv2d' xavier_uniform")
        if (scheme := _scheme_in_pieces(words)) is not None:
            raise RequestError(f"{words[-1]!r} is not a scheme but an argument of one", f"write it as {scheme!r}")
        hint = "the scheme comes last: init '**:Conv2d' xavier_uniform, or 'normal(0, 0.01)'"
        return cls(targets=tuple(map(selector, words[:-1])), scheme=_scheme(words[-1], hint))

    def modules(self) -> tuple[Call, ...]:
        return ()  # a scheme is a function of torch.nn.init, and nothing else is taken

    def operands(self) -> list[str]:
        return [*self.targets, _written(self.scheme)]


def _scheme_in_pieces(words: Sequence[str]) -> str | None:
    """Return the scheme if its name and arguments are separate words: `normal(std=0.01)` for `fc normal std=0.01`."""
    first = next((place for place in range(len(words), 0, -1) if not _is_argument(words[place - 1])), 0)
    if first < 2 or first == len(words) or not words[first - 1].isidentifier():
        return None
    return f"{words[first - 1]}({', '.join(words[first:])})"


def _is_argument(word: str) -> bool:
    """Whether a word is a number or a keyword argument: `0.01`, `std=0.01`."""
    return re.fullmatch(r"([A-Za-z_]\w*=.+|[-+]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)", word, re.ASCII) is not None
