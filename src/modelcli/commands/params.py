"""Which tensors `params` shows, in which order, their values and their statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelcli.commands.look import Look, stdout_is_for_data
from modelcli.model.blueprint import Blueprint
from modelcli.model.tensors import TensorInfo

if TYPE_CHECKING:
    from modelcli.live.stats import Statistics


@stdout_is_for_data
def values(found: Look, names: Sequence[str], *, whole: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The numbers of tensors: as nested lists where `whole`, and as one line each."""
    from modelcli.live import values as reading

    if found.live is not None:
        return reading.of_live(found.live, names, whole=whole)
    assert found.contents is not None
    return reading.of_contents(found.contents, names, whole=whole)


@stdout_is_for_data
def stats(found: Look, names: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, Statistics]:
    """Statistics of the numbers of tensors, by name: see `live.stats.collect`.

    `progress` is told how many bytes are done, and how many there are.
    """
    from modelcli.live import stats as reading

    if found.live is not None:
        return reading.of_live(found.live, names, progress)
    assert found.contents is not None
    return reading.of_contents(found.contents, names, progress)


def select_tensors(
    blueprint: Blueprint,
    selected: Sequence[str],
    *,
    buffers: bool,
    frozen: bool,
    trainable: bool,
) -> list[TensorInfo]:
    """The tensors to show: those selected, less buffers or flags that were not asked for."""
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
    """Tensors by a column or a statistic: words from A to Z, numbers from the largest, what has neither at the end.

    Zeros count by their share of the tensor.
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
