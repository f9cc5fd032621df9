"""The words of `--keep-weights`: how old values go over to a new module."""

from __future__ import annotations

#: The part that both tensors have.
OVERLAP = "overlap"
#: The weights of a convolution, summed or averaged over its input channels.
SUM, MEAN = "sum", "mean"
