"""extract: make a submodule the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.base import Edit
from modelcli.edits.declaring import Operand, selector
from modelcli.edits.picking import parts_below
from modelcli.edits.placing import PATH
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.model.state_dict import StateDictModel


@dataclass(frozen=True, kw_only=True)
class Extract(Edit):
    """Make the submodule at `path` the whole model."""

    path: str

    name: ClassVar[str] = "extract"
    summary: ClassVar[str] = "Make a submodule the whole model."
    effect: ClassVar[str] = "makes that submodule the whole model; its input is what flowed into it"
    in_pytorch: ClassVar[str] = "`model.features`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli extract features -m squeezenet1_1 -o backbone.pth",
        "modelcli extract layer1.0 -m resnet18",
    )
    words: ClassVar[tuple[Operand, ...]] = (PATH,)
    handler: ClassVar[str] = "modelcli.live.surgery.extract"
    moves_paths: ClassVar[bool] = True
    changes_input: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) != 1:
            raise RequestError("extract takes one path", "extract features")
        return cls(path=selector(words[0]))

    def operands(self) -> list[str]:
        return [self.path]

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        path = selectors.select_one(model.blueprint, self.path, self.name)
        if not path:
            raise RequestError("the model itself is the model already", "extract takes a path in it: extract features")
        parts = parts_below(model, ["", path])
        line = str(Extract(path=selectors.literal(path)))
        whole, part = parts[""], parts[path]
        change = Change(path, self.name, whole.brief, part.brief, whole.params, part.params, (line,))
        prefix = f"{path}."
        modules = {"": model.modules[path]} | {
            below.removeprefix(prefix): module for below, module in model.modules.items() if below.startswith(prefix)
        }
        entries = {name.removeprefix(prefix): entry for name, entry in model.entries.items() if name.startswith(prefix)}
        return Applied(StateDictModel(entries, modules), [change])
