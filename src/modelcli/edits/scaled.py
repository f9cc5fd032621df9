"""The hint of edits that refuse weights with scales: the line that gives such weights their values first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelcli.edits import words as line_words
from modelcli.language import selectors
from modelcli.model.scaled_weights import Scaled, is_plain_fp8

#: What to do about weights that `dequantize` does not know.
NOT_KNOWN = (
    "leave scaled weights and their scales out with --except, or dequantize the file with the program that wrote it"
)


def hint_to_dequantize(pair: Scaled, dtypes: Mapping[str, str], dtype: str, words: Sequence[str] | None = None) -> str:
    """Return the line that multiplies a weight by its scale, or what else to do where `dequantize` does not know it.

    Args:
        pair: the weight and its scale.
        dtypes: the dtypes of all tensors.
        dtype: the dtype that the weight is to have.
        words: the selectors and options of the edit, if `dequantize` takes the same; else the weight alone is named.
    """
    if not is_plain_fp8(pair, dtypes):
        return NOT_KNOWN
    wanted = "bfloat16" if dtype.startswith("float8") else dtype
    targets = [selectors.literal(pair.weight)] if words is None else list(words)
    return f"apply the scales first: {line_words.joined(['dequantize', *targets, wanted])}"
