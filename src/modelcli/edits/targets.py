"""What edits of selected modules and tensors have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits.base import Edit
from modelcli.edits.declaring import NUMBER, SELECTORS, TENSORS, Operand, option, selector
from modelcli.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Selecting(Edit):
    """An edit of what selectors pick, with `--except` and `--expect`."""

    without: tuple[str, ...] = option(
        "--except", SELECTORS, (), "Leave out what this selector picks.", metavar="SELECTOR", completes=(TENSORS,)
    )
    expect: int | None = option("--expect", NUMBER, None, "Fail unless exactly N match.", metavar="N")


@dataclass(frozen=True, kw_only=True)
class OfTargets(Selecting):
    """An edit whose only operands are targets. `example` is a target, for errors."""

    example: ClassVar[str]
    targets: tuple[str, ...]

    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Selectors of modules or parameters.",
            "TARGET...",
            several=True,
            completes=(TENSORS,),
            completes_later=(TENSORS,),
        ),
    )

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if not words:
            raise RequestError(f"{cls.name} takes at least one target", f"{cls.name} {cls.example}")
        return cls(targets=tuple(map(selector, words)))

    def operands(self) -> list[str]:
        return list(self.targets)
