"""add: a new child under a name that is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.placing import Placing


@dataclass(frozen=True, kw_only=True)
class Add(Placing):
    """Add a child with a name of its own: `path` is where it will be, and nothing is there yet."""

    name: ClassVar[str] = "add"
    summary: ClassVar[str] = "Add a child under a name that is free."
    effect: ClassVar[str] = "adds a child under a name that is free"
    in_pytorch: ClassVar[str] = '`m.add_module("100", ...)`'
    example: ClassVar[str] = "classifier.dropout 'Dropout(0.5)'"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli add features.dropout 'Dropout(0.5)' -m alexnet",
        "modelcli add classifier.4 'Softmax(dim=1)' -m squeezenet1_1 -o out.pth",
    )
    handler: ClassVar[str] = "modelcli.live.surgery.add"
