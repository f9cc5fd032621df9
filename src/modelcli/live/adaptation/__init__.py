"""adapt: the edits that change the number of classes or of input channels, the image size, or the vocabulary."""

from __future__ import annotations

from modelcli.live.adaptation.planning import plan

__all__ = ["plan"]
