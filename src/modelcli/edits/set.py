"""set: change settings of modules that decide no tensor's shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from modelcli.edits.declaring import MODULES, Operand, selector
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError
from modelcli.language import expressions, selectors
from modelcli.language.expressions import Call, Name

_EXAMPLE = "set '**:Dropout' p=0.1"
_SETTING = re.compile(r"([^\W\d]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Set(Selecting):
    """Change settings of the matching modules. `settings` are names and plain values, in the order given."""

    targets: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]

    name: ClassVar[str] = "set"
    summary: ClassVar[str] = "Change settings that decide no tensor's shape; NAME=None takes a child out."
    effect: ClassVar[str] = (
        "changes settings that decide no tensor's shape, and what the constructor derives from them; `NAME=None` for "
        "a child takes it out. A state dict does not hold settings: `modelcli.load` sets them, another program that "
        "loads the file has to"
    )
    in_pytorch: ClassVar[str] = "`model.drop.p = 0.1`, `model.aux_classifier = None`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli set '**:BatchNorm2d' momentum=0.01 eps=1e-3 -m resnet18 -o bn.pth",
        "modelcli set '**:Dropout' p=0.1 -m alexnet",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Selectors of modules, then the settings: p=0.1, padding_mode=reflect.",
            "TARGET... NAME=VALUE...",
            several=True,
            completes=(MODULES,),
            completes_later=(MODULES,),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("configure", "setattr")
    handler: ClassVar[str] = "modelcli.live.surgery.set"

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        first = next((place for place, word in enumerate(words) if _SETTING.fullmatch(word)), len(words))
        targets, given = words[:first], words[first:]
        if not targets or not given:
            raise RequestError("set takes at least one target and one setting", _EXAMPLE)
        settings: dict[str, Any] = {}
        for word in given:
            name, value = _setting(word)
            if name in settings:
                raise RequestError(f"{name} is given twice")
            settings[name] = value
        return cls(targets=tuple(map(selector, targets)), settings=tuple(settings.items()))

    def operands(self) -> list[str]:
        return [*self.targets, *(setting_text(name, value) for name, value in self.settings)]


def target_of(path: str) -> str:
    """Return a selector of one module that is not taken for a setting: the path `a=1` becomes `a\\=1`."""
    text = selectors.literal(path) if path else "."
    return text.replace("=", "\\=") if _SETTING.fullmatch(text) else text


def setting_text(name: str, value: Any) -> str:
    """Return the word for a setting: `p=0.1`."""
    return f"{name}={expressions.to_text(value)}"


def _setting(word: str) -> tuple[str, Any]:
    """Return the name and the value in a word. Raises RequestError for anything but NAME=VALUE with a plain value."""
    match = _SETTING.fullmatch(word)
    if match is None or not match[1].isidentifier():
        raise RequestError(f"{word!r} is no setting: settings are written NAME=VALUE, behind the targets", _EXAMPLE)
    name, text = match.groups()
    if not text:
        raise RequestError(f"{name}= has no value", f"{name}=None, {name}=True, or {name}='\"\"' for an empty text")
    value = _value(text)
    if expressions.holds_hole(value):
        raise RequestError(f"{word!r}: _ stands for an old value, and set changes only what you name", "leave it out")
    if any(isinstance(part, Call | Name) for part in _parts(value)):
        raise RequestError(
            f"{word!r}: a setting is a number, a text, True, False, None, or a list or tuple of them",
            "replace puts a module in, and cast changes dtypes",
        )
    return name, value


def _value(text: str) -> Any:
    """Return the value in a text: a Python literal, or the text itself. Raises RequestError for what is neither."""
    if text.isascii():
        return expressions.word_value(text)
    try:
        return expressions.parse_value(text)
    except RequestError:  # a word in another script, without quotes
        return text


def _parts(value: Any) -> list[Any]:
    """Return a value and the values inside it."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [value, *(part for item in inside for part in _parts(item))]
