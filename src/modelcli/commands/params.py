"""Select and sort the tensors that `params` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelcli.model.blueprint import Blueprint
from modelcli.model.tensors import TensorInfo


def select_tensors(
    blueprint: Blueprint,
    selected: Sequence[str],
    *,
    buffers: bool,
    frozen: bool,
    trainable: bool,
) -> list[TensorInfo]:
    """Return the tensors to show: the selected ones, filtered by kind and by `requires_grad`."""
    tensors = list(blueprint.tensors)
    if selected:
        from modelcli.language import selectors

        names = set(selectors.select_tensors(blueprint, selected))
        tensors = [tensor for tensor in tensors if tensor.name in names]
    if not buffers:
        tensors = [tensor for tensor in tensors if tensor.kind != "buffer"]
    if frozen or trainable:
        wanted = {False} if frozen and not trainable else {True} if trainable and not frozen else {True, False}
        tensors = [tensor for tensor in tensors if tensor.requires_grad in wanted]
    return tensors


def sort_tensors(
    tensors: Sequence[TensorInfo], key: str, statistics: Mapping[str, Mapping[str, Any]] | None = None
) -> list[TensorInfo]:
    """Sort tensors by a column or a statistic: text from A to Z, numbers from the largest, missing values last.

    `zeros` sorts by the share of zeros in the tensor.
    """

    def rank(tensor: TensorInfo) -> tuple[bool, Any]:
        if key in ("elements", "bytes"):
            return False, -(tensor.elements if key == "elements" else tensor.nbytes)
        if statistics is None:
            word = getattr(tensor, key)
            return word is None, word
        number = statistics.get(tensor.name, {}).get(key)
        if number is None:
            return True, 0
        return False, -number / tensor.elements if key == "zeros" and number else -number

    return sorted(tensors, key=rank)
