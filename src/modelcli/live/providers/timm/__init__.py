"""timm: models by their names and from folders, what pretrained weights go through while they are loaded."""

from __future__ import annotations

from modelcli.live.providers.timm.provider import LiveTimm

__all__ = ["LiveTimm"]
