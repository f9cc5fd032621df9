"""clamp: no value beyond two bounds. The declaration: words, help, traits; no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli.edits.applied import Change
from modelcli.edits.declaring import TENSORS, Operand, finite_number, number_text, selector
from modelcli.edits.picking import dense_notes, groups_of, names_of_one, tie_notes
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint
from modelcli.model.dtypes import FLOATING


@dataclass(frozen=True, kw_only=True)
class Clamp(Selecting):
    """Bring the floating-point values of what matches into a range."""

    targets: tuple[str, ...]
    low: float
    high: float

    name: ClassVar[str] = "clamp"
    summary: ClassVar[str] = "Bring values into a range: what is beyond it becomes its nearer end."
    effect: ClassVar[str] = "brings floating-point values into a range"
    in_pytorch: ClassVar[str] = "`tensor.clamp_(low, high)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli clamp '**.bias' -1 1 -m squeezenet1_1 -o out.pth",
        "modelcli clamp fc -0.5 0.5 -m resnet18",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Selectors, then the two ends of the range: -1 1.",
            "TARGET... LOW HIGH",
            several=True,
            completes=(TENSORS,),
            completes_later=(TENSORS,),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("clip",)
    handler: ClassVar[str] = "modelcli_plugin.clamp_live"
    can_break_fit: ClassVar[bool] = False
    changes_values_only: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 3:
            raise RequestError("clamp takes at least one target and two numbers", "clamp fc -1 1")
        *targets, low, high = words
        ends = finite_number(low), finite_number(high)
        if ends[0] > ends[1]:
            raise RequestError(f"{low} to {high} is no range", f"clamp {' '.join(targets)} {high} {low}")
        return cls(targets=tuple(map(selector, targets)), low=ends[0], high=ends[1])

    def operands(self) -> list[str]:
        return [*self.targets, number_text(self.low), number_text(self.high)]


@dataclass(frozen=True)
class Clamping:
    """Which tensors are clamped, and what there is to tell of that."""

    names: list[str]
    changes: list[Change]
    notes: list[str]


def clamping(edit: Clamp, blueprint: Blueprint, dense: Collection[str]) -> Clamping:
    """What a clamp comes to; `dense` are the names of the tensors whose values can change.

    Raises RequestError where there is nothing to clamp.
    """
    known = blueprint.by_name
    picked = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    picked = [name for name in picked if known[name].dtype in FLOATING]
    names = [name for name in picked if name in dense]
    if not names:
        raise RequestError(f"nothing to clamp: {', '.join(edit.targets)} has no dense floating-point tensors")
    changes = []
    for path, below in groups_of(edit.targets, blueprint, names):
        tensors = {known[name].identity: known[name] for name in below}
        size = sum(tensor.elements for tensor in tensors.values() if tensor.kind == "parameter")
        changes.append(
            Change(
                path, edit.name, "as it was", f"from {number_text(edit.low)} to {number_text(edit.high)}", size, size
            )
        )
    selectors.require_expected(edit.expect, [change.path for change in changes])
    line = str(replace(edit, targets=tuple(map(selectors.literal, names)), without=(), expect=None))
    notes = [*tie_notes(names_of_one(blueprint), names, "clamped"), *dense_notes(picked, dense)]
    return Clamping(names, [replace(changes[0], resolved=(line,)), *changes[1:]], notes)
