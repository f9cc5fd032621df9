"""append: a new module at the end of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.placing import Arranged, Placing, kind_of, own_names
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model.paths import joined, parent_of, shown
from modelcli.model.state_dict import StateDictModel


@dataclass(frozen=True, kw_only=True)
class Append(Placing):
    """Add at the end of the sequence at `path`."""

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

    @classmethod
    def again(cls, path: str) -> str:
        return f"{cls.name} {quoted(shown(parent_of(path)))}"

    def placed(self, model: StateDictModel) -> tuple[str, Arranged]:
        path = selectors.select_one(model.blueprint, self.path, self.name)
        names = own_names(model, path)
        name, info = str(len(names)), model.modules[path].info
        if info is None or not info.is_sequence:
            raise RequestError(
                f"append needs a Sequential or ModuleList; {shown(path)} {kind_of(model, path)} is neither",
                f"add {quoted(joined(path, 'NAME'))} MODULE puts a child with a name at the end",
            )
        if name in names:
            raise RequestError(
                f"{shown(path)} has {name} children, and one of them is called {name} already",
                f"add {quoted(joined(path, 'NAME'))} MODULE puts a child with another name at the end",
            )
        children: dict[str, str | None] = dict(zip(names, model.children[path], strict=True))
        return path, Arranged(name, {**children, name: None})
