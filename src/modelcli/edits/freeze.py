"""freeze: parameters that are no longer trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.targets import OfTargets


@dataclass(frozen=True, kw_only=True)
class Freeze(OfTargets):
    """Set `requires_grad` of the parameters that match to False."""

    #: What `requires_grad` becomes.
    trains: ClassVar[bool] = False

    name: ClassVar[str] = "freeze"
    summary: ClassVar[str] = "Stop training parameters: requires_grad becomes False."
    effect: ClassVar[str] = "stops training parameters"
    in_pytorch: ClassVar[str] = "`requires_grad_(False)`"
    example: ClassVar[str] = "features"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli freeze 'layer?' -m best.pth -o still.pth",
        "modelcli freeze . --except fc",
    )
    handler: ClassVar[str] = "modelcli.live.surgery.freeze"
    can_break_fit: ClassVar[bool] = False
    changes_flags_only: ClassVar[bool] = True
