"""insert: a new module before a position of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.placing import Placing, renumber_option


@dataclass(frozen=True, kw_only=True)
class Insert(Placing):
    """Insert before a position of a sequence whose children are `0..n-1`; the later ones move up.

    `renumber` says that the numbered children of a bare checkpoint are such a sequence.
    """

    renumber: bool = renumber_option()

    name: ClassVar[str] = "insert"
    summary: ClassVar[str] = "Insert before a position of a Sequential or ModuleList; the later ones move up."
    effect: ClassVar[str] = "inserts before that position of a `Sequential` or `ModuleList`; the later ones move up"
    in_pytorch: ClassVar[str] = "`model.features.insert(1, ...)`"
    example: ClassVar[str] = "features.1 'BatchNorm2d(64)'"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli insert features.1 'BatchNorm2d(_)' -m squeezenet1_1 -o out.pth",
        "modelcli insert classifier.0 'Dropout(0.2)' -m alexnet",
    )
    handler: ClassVar[str] = "modelcli.live.surgery.insert"
    moves_paths: ClassVar[bool] = True
