"""freeze: set `requires_grad` of parameters to False."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.flags import Flags


@dataclass(frozen=True, kw_only=True)
class Freeze(Flags):
    """Set `requires_grad` of the parameters that match to False."""

    trains: ClassVar[bool] = False

    name: ClassVar[str] = "freeze"
    summary: ClassVar[str] = "Freeze parameters: set requires_grad to False."
    effect: ClassVar[str] = "sets `requires_grad` to False"
    in_pytorch: ClassVar[str] = "`requires_grad_(False)`"
    example: ClassVar[str] = "features"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli freeze 'layer?' -m best.pth -o still.pth",
        "modelcli freeze . --except fc",
    )
