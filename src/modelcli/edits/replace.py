"""replace: a new module in the place of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits.declaring import FLAG, MODULES, SELECTORS, Operand, option
from modelcli.edits.placing import MODULE, place_and_module
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError
from modelcli.language import expressions
from modelcli.language.expressions import Call
from modelcli.language.quoting import quoted


@dataclass(frozen=True, kw_only=True)
class Replace(Selecting):
    """Put a new module in place of every match.

    `also` are further targets, such as the other names of a shared module; `keep_weights` carries over the overlapping
    part of each tensor that means the same in both modules; `untie` replaces a shared module under the names picked
    alone.
    """

    target: str
    module: Call
    also: tuple[str, ...] = option(
        "--also",
        SELECTORS,
        (),
        "Replace what this selector picks too: other names of a shared module.",
        metavar="SELECTOR",
        completes=(MODULES,),
    )
    keep_weights: bool = option("--keep-weights", FLAG, False, "Carry the old values over where they mean the same.")
    untie: bool = option("--untie", FLAG, False, "Replace a shared module under the names picked alone.")

    name: ClassVar[str] = "replace"
    summary: ClassVar[str] = "Put a new module in place of every match. _ in its arguments means: as it was."
    effect: ClassVar[str] = (
        "puts a new module in place of every match. `--keep-weights` carries the values over where a tensor means "
        "the same in both modules: the overlapping part, transposed where one is a linear layer that has its "
        "weight the other way round"
    )
    in_pytorch: ClassVar[str] = "`model.classifier[6] = nn.Linear(4096, 10)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli replace fc 'Linear(_,10)' -m resnet18 -o head10.pth",
        "modelcli replace '**:ReLU' GELU -m vgg16",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand("target", "A selector of modules: classifier.6, '**:ReLU'.", completes=(MODULES,)),
        MODULE,
    )
    also_called: ClassVar[tuple[str, ...]] = ("set", "swap", "change")
    handler: ClassVar[str] = "modelcli.live.surgery.replace"
    places_module: ClassVar[bool] = True
    replaces_module: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("replace takes a target and a module", "replace classifier.6 'Linear(4096,10)'")
        target, module = place_and_module(cls.name, "replace takes one target", words)
        return cls(target=target, module=module)

    @property
    def targets(self) -> tuple[str, ...]:
        """All selectors of what is replaced."""
        return (self.target, *self.also)

    def operands(self) -> list[str]:
        return [self.target, expressions.to_text(self.module)]

    @classmethod
    def again(cls, path: str) -> str:
        return f"{cls.name} {quoted(path)}"
