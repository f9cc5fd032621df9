"""resize: give a model another image size, number of channels or vocabulary, and carry the values over."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits.base import Edit
from modelcli.edits.declaring import MODULES, Operand, selector
from modelcli.errors import RequestError, did_you_mean

#: The sizes that a model may have.
IMAGE_SIZE, IN_CHANNELS, VOCAB_SIZE = "image_size", "in_channels", "vocab_size"
_NAMES = (IMAGE_SIZE, IN_CHANNELS, VOCAB_SIZE)
_EXAMPLE = "resize . image_size=384"


@dataclass(frozen=True, kw_only=True)
class Resize(Edit):
    """Give models another size, as their library does, or embeddings another number of rows.

    `what` is one of the names above. `targets` is a model of a library, or for `vocab_size` also the embeddings and
    linear layers that have a row for each token.
    """

    targets: tuple[str, ...]
    what: str
    size: int

    name: ClassVar[str] = "resize"
    summary: ClassVar[str] = "Give a model another image_size, in_channels or vocab_size, and carry its values over."
    effect: ClassVar[str] = (
        "gives a model another size and carries its values over as its library does: `image_size=384` interpolates "
        "position embeddings, `vocab_size=32000` keeps the rows of the embeddings and draws new ones around their "
        "mean, `in_channels=1` sums the first convolution over its channels. "
        "Targets of `vocab_size` may also be embeddings and linear layers"
    )
    in_pytorch: ClassVar[str] = "`model.resize_token_embeddings(32000)`, `interpolate_embeddings(...)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli resize . image_size=384 -m vit_b_16 -o vit384.pth",
        "modelcli resize 0 vocab_size=120 -m 'Sequential(Embedding(100,8),Linear(8,4))'",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Modules (. is the whole model), then what is resized: image_size=384, vocab_size=32000.",
            "TARGET... NAME=SIZE",
            several=True,
            completes=(MODULES,),
            completes_later=(MODULES, lambda: [f"{name}=" for name in _NAMES]),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("interpolate", "resize-embeddings")
    handler: ClassVar[str] = "modelcli.live.surgery.resize"
    changes_input: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("resize takes at least one target and a size", _EXAMPLE)
        *targets, last = words
        name, equals, size = last.partition("=")
        if not equals or not name.isidentifier():
            raise RequestError(f"{last!r} is no size: NAME=SIZE comes last", _EXAMPLE)
        if name not in _NAMES:
            raise RequestError(f"resize has no {name!r}", did_you_mean(name, _NAMES) or f"it has {', '.join(_NAMES)}")
        if not re.fullmatch(r"[1-9]\d{0,8}", size, re.ASCII):
            raise RequestError(f"{name} takes a whole number from 1, not {size!r}", _EXAMPLE)
        return cls(targets=tuple(map(selector, targets)), what=name, size=int(size))

    def operands(self) -> list[str]:
        return [*self.targets, f"{self.what}={self.size}"]
