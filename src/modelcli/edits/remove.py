"""remove: a model without some of its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.placing import renumber_option
from modelcli.edits.targets import OfTargets


@dataclass(frozen=True, kw_only=True)
class Remove(OfTargets):
    """Take modules out; in a sequence whose children are `0..n-1` the later ones move down.

    `renumber` says that the numbered children of a bare checkpoint are such a sequence.
    """

    renumber: bool = renumber_option()

    name: ClassVar[str] = "remove"
    summary: ClassVar[str] = "Take modules out; in a Sequential or ModuleList the later ones move down."
    effect: ClassVar[str] = (
        "takes modules out; in a `Sequential` or `ModuleList` with children `0` to `n-1` the later ones move down"
    )
    in_pytorch: ClassVar[str] = "`.pop(6)`, `del`"
    example: ClassVar[str] = "classifier.6"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli remove '**:Dropout' -m squeezenet1_1 -o out.pth",
        "modelcli remove classifier.6 -m alexnet",
    )
    also_called: ClassVar[tuple[str, ...]] = ("rm", "delete", "del", "drop", "pop")
    handler: ClassVar[str] = "modelcli.live.surgery.remove"
    moves_paths: ClassVar[bool] = True
