"""append: a new module at the end of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.placing import Placing
from modelcli.language.quoting import quoted
from modelcli.model.paths import parent_of, shown


@dataclass(frozen=True, kw_only=True)
class Append(Placing):
    """Add at the end of the sequence at `path`."""

    name: ClassVar[str] = "append"
    summary: ClassVar[str] = "Add at the end of a Sequential or ModuleList."
    effect: ClassVar[str] = "adds at the end of a `Sequential` or `ModuleList`"
    in_pytorch: ClassVar[str] = "`.append(...)`"
    example: ClassVar[str] = "classifier 'Softmax(dim=1)'"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli append classifier 'Softmax(dim=1)' -m squeezenet1_1 -o out.pth",
        "modelcli append classifier 'Linear(_,10)' -m alexnet",
    )
    handler: ClassVar[str] = "modelcli.live.surgery.append"

    @classmethod
    def again(cls, path: str) -> str:
        return f"{cls.name} {quoted(shown(parent_of(path)))}"
