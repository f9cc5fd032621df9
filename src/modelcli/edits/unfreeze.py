"""unfreeze: set `requires_grad` of parameters to True."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelcli.edits.flags import Flags


@dataclass(frozen=True, kw_only=True)
class Unfreeze(Flags):
    """Set `requires_grad` of the parameters that match to True."""

    trains: ClassVar[bool] = True

    name: ClassVar[str] = "unfreeze"
    summary: ClassVar[str] = "Make parameters trainable: set requires_grad to True."
    effect: ClassVar[str] = "sets `requires_grad` to True"
    in_pytorch: ClassVar[str] = "`requires_grad_(True)`"
    example: ClassVar[str] = "classifier"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli unfreeze fc -m frozen.pth -o head.pth",
        "modelcli unfreeze '**:BatchNorm2d'",
    )
