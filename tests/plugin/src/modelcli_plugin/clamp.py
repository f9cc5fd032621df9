"""clamp: no value beyond two bounds. The declaration: words, help, traits; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits.declaring import TENSORS, Operand, selector
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError


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
        ends = _number(low), _number(high)
        if ends[0] > ends[1]:
            raise RequestError(f"{low} to {high} is no range", f"clamp {' '.join(targets)} {high} {low}")
        return cls(targets=tuple(map(selector, targets)), low=ends[0], high=ends[1])

    def operands(self) -> list[str]:
        return [*self.targets, f"{self.low:g}", f"{self.high:g}"]


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise RequestError(f"{word!r} is no number", "the range comes last: clamp fc -1 1") from None
