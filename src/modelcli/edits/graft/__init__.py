"""graft: take the values of a module's tensors from another model or checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli.edits.applied import Applied, Context
from modelcli.edits.base import Edit
from modelcli.edits.declaring import FLAG, MODULES, REFERENCES, Kind, Operand, option, selector
from modelcli.edits.words import joined, split_words
from modelcli.errors import RequestError
from modelcli.model.state_dict import StateDictModel

#: Two keys with wildcards, as `rename` takes them.
NamePair = tuple[str, str]


def _pair(flag: str, word: str) -> NamePair:
    """Return the old and the new name of one word. Raises RequestError if these are not two selectors."""
    names = split_words(word)
    if len(names) != 2:
        raise RequestError(f"{flag} takes an old and a new name, not {word!r}", f"{flag} 'encoder.** **'")
    return selector(names[0]), selector(names[1])


def _text(flag: str, word: str) -> str:
    """Return the word. Raises RequestError if it is empty."""
    if not word:
        raise RequestError(f"{flag} takes a name, not an empty word")
    return word


_TEXT = Kind(_text)
_PAIRS = Kind(_pair, several=True, text=joined)


@dataclass(frozen=True, kw_only=True)
class Graft(Edit):
    """Take the values of the tensors at and below a module from another model or checkpoint."""

    path: str
    other: str
    renames: tuple[NamePair, ...] = option(
        "--rename",
        _PAIRS,
        (),
        "Rename the source's keys first, as rename does: 'encoder.** **'. May be repeated.",
        metavar="'OLD NEW'",
    )
    lenient: bool = option(
        "--no-strict", FLAG, False, "Take what matches; what the source lacks or has in another shape stays as it was."
    )
    also_init: bool = option(
        "--also-init", FLAG, False, "Initialise what gets no values anew, by its module's reset_parameters."
    )
    source_weights: str | None = option(
        "--source-weights",
        _TEXT,
        None,
        "Weights of a SOURCE that is a builder: DEFAULT, a name, or a file.",
        metavar="WEIGHTS",
    )
    source_key: str | None = option(
        "--source-key", _TEXT, None, "The state dict inside a SOURCE that is a training checkpoint.", metavar="NAME"
    )

    name: ClassVar[str] = "graft"
    summary: ClassVar[str] = "Take the values of a module's tensors from another model or checkpoint."
    effect: ClassVar[str] = (
        "takes the values of the tensors at and below PATH from another model or checkpoint, or from a part of it; "
        "names and shapes have to match, as for `load`"
    )
    in_pytorch: ClassVar[str] = "`model.backbone.load_state_dict(other.state_dict())`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli graft layer4 best.pth:layer4 -m resnet18 -o out.pth",
        "modelcli graft 0 bare.pth --rename 'head.** **' --no-strict -m 'Sequential(Linear(2,3))'",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand("path", "A path: backbone. The whole model: .", completes=(MODULES,)),
        Operand(
            "other",
            "Another model, and a part of it: dino.pth, timm:resnet50:layer4.",
            "SOURCE[:PATH]",
            completes=(REFERENCES,),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("transplant", "load-into")
    handler: ClassVar[str] = "modelcli.live.surgery.graft"
    can_break_fit: ClassVar[bool] = False
    changes_values_only: ClassVar[bool] = True
    reads_models: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) != 2 or not words[1]:
            raise RequestError("graft takes a path and another model", "graft backbone dino.pth")
        return cls(path=selector(words[0]), other=words[1])

    def operands(self) -> list[str]:
        return [self.path, self.other]

    def references(self) -> tuple[str, ...]:
        return (self.other,)

    def with_paths(self, seen: Callable[[str], str]) -> Self:
        weights = self.source_weights
        return replace(self, other=seen(self.other), source_weights=None if weights is None else seen(weights))

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        from modelcli.edits.graft.keys import graft_keys

        return graft_keys(self, model, context)
