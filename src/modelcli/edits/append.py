"""append: put a new module at the end of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.holders import Holder
from modelcli.edits.placing import Placing
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import joined, shown


@dataclass(frozen=True, kw_only=True)
class Append(Placing):
    """Add a module at the end of the sequence at `path`."""

    name: ClassVar[str] = "append"
    summary: ClassVar[str] = "Add a module at the end of a Sequential or ModuleList."
    effect: ClassVar[str] = "adds a module at the end of a `Sequential` or `ModuleList`"
    in_pytorch: ClassVar[str] = "`.append(...)`"
    example: ClassVar[str] = "classifier 'Softmax(dim=1)'"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli append classifier 'Softmax(dim=1)' -m squeezenet1_1 -o out.pth",
        "modelcli append classifier 'Linear(_,10)' -m alexnet",
    )
    line_names_holder: ClassVar[bool] = True
    handler: ClassVar[str] = "modelcli.live.surgery.append"

    def place(self, blueprint: Blueprint) -> tuple[str, str]:
        return selectors.select_one(blueprint, self.path, self.name), ""

    def name_in(self, holder: Holder, word: str) -> str:
        """The number of the children, as PyTorch's own `append` calls a new one."""
        name = str(len(holder.children))
        if not holder.is_sequence:
            raise RequestError(
                f"append needs a Sequential or ModuleList; {shown(holder.path)} {holder.type} is neither",
                f"add {quoted(joined(holder.path, 'NAME'))} MODULE puts a child with a name at the end",
            )
        if name in holder.children:
            raise RequestError(
                f"{shown(holder.path)} has {name} children, and one of them is called {name} already",
                f"add {quoted(joined(holder.path, 'NAME'))} MODULE puts a child with another name at the end",
            )
        return name
