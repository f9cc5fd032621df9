"""add: a new child under a name that is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.picking import parts_below
from modelcli.edits.placing import Arranged, Placing, holder_and_name, kind_of
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model.paths import joined
from modelcli.model.state_dict import StateDictModel


@dataclass(frozen=True, kw_only=True)
class Add(Placing):
    """Add a child with a name of its own: `path` is where it will be, and nothing is there yet."""

    name: ClassVar[str] = "add"
    summary: ClassVar[str] = "Add a module as a child, under a new name."
    effect: ClassVar[str] = "adds a module as a child, under a new name"
    in_pytorch: ClassVar[str] = '`m.add_module("100", ...)`'
    example: ClassVar[str] = "classifier.dropout 'Dropout(0.5)'"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli add features.dropout 'Dropout(0.5)' -m alexnet",
        "modelcli add classifier.4 'Softmax(dim=1)' -m squeezenet1_1 -o out.pth",
    )
    handler: ClassVar[str] = "modelcli.live.surgery.add"

    def placed(self, model: StateDictModel) -> tuple[str, Arranged]:
        path, own = holder_and_name(model.blueprint, self)
        name = selectors.plain(own)
        if name is None:
            raise RequestError(f"add takes a name for the new module, and {own!r} is a pattern", "write the name out")
        _require_free(model, path, name)
        children: dict[str, str | None] = {child.rpartition(".")[2]: child for child in model.children[path]}
        return path, Arranged(name, {**children, name: None})


def _require_free(model: StateDictModel, path: str, name: str) -> None:
    """Raise RequestError where the module has something of this name, or could not be called by it."""
    there = joined(path, name)
    if there in model.children[path]:
        raise RequestError(
            f"{there} is there already: {parts_below(model, [there])[there].brief}",
            f"replace {quoted(there)} puts another module in its place",
        )
    if there in model.tensors:
        raise RequestError(f"{there} is a tensor, and no child can have its name", "add takes a name that is free")
    module = model.modules[path]
    if module.made is not None and getattr(module.made, name, None) is not None:
        raise RequestError(
            f"{kind_of(model, path)} has something else called {name}: no child can have that name",
            "add takes a name that is free",
        )
