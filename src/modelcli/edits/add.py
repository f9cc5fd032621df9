"""add: a new child under a name that is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.holders import Holder
from modelcli.edits.placing import Placing
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model.paths import joined


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

    def name_in(self, holder: Holder, word: str) -> str:
        name = selectors.plain(word)
        if name is None:
            raise RequestError(f"add takes a name for the new module, and {word!r} is a pattern", "write the name out")
        _require_free(holder, name)
        return name


def _require_free(holder: Holder, name: str) -> None:
    """Raise RequestError if the module already has something of this name, or if no child can have it."""
    there = joined(holder.path, name)
    if (child := holder.child(name)) is not None:
        raise RequestError(
            f"{there} is there already: {child}", f"replace {quoted(there)} puts another module in its place"
        )
    if holder.has_tensor(name):
        raise RequestError(f"{there} is a tensor, and no child can have its name", "add takes a name that is free")
    if holder.has_attribute(name):
        raise RequestError(
            f"{holder.type} has something else called {name}: no child can have that name",
            "add takes a name that is free",
        )
