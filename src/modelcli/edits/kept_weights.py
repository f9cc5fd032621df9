"""The words of `--keep-weights`: how old values go over to a new module."""

from __future__ import annotations

#: The part that both tensors have.
OVERLAP = "overlap"
#: The weights of a convolution, summed or averaged over its input channels.
SUM, MEAN = "sum", "mean"
#: The values again and again until the new tensor is full, along every axis but those of a kernel.
REPEAT = "repeat"
#: The kernels of a convolution and the position embeddings, interpolated to another size.
INTERPOLATE = "interpolate"
#: All of them, the one without a value first.
WORDS = (OVERLAP, SUM, MEAN, REPEAT, INTERPOLATE)
#: What each word changes, for the note if there is nothing of that kind.
NOTHING = {
    SUM: "no convolution gets other input channels",
    MEAN: "no convolution gets other input channels",
    REPEAT: "no tensor gets larger",
    INTERPOLATE: "no kernel of two dimensions and no position embedding gets another size",
}
