"""The numbers of tensors, to be shown: whole for a program, in one short line for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from modelcli.checkpoints import Contents
from modelcli.errors import RequestError
from modelcli.live import loading
from modelcli.live.opening import Live
from modelcli.live.sources import NUMBER, budget_of, is_composite, is_lazy, named_tensors, near_windows, real_tensor
from modelcli.model.tensors import Shape

#: Up to this many numbers are shown whole; of more, the first and the last three along each axis.
WHOLE = 24
EDGE = 3
#: More than this many are shown of no tensor.
MOST = 1_000


def of_live(live: Live, names: Sequence[str], *, whole: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers of a live model: drawn or read only for the tensors asked for."""
    tensors = {name: tensor for name, tensor in named_tensors(live.module).items() if _has_numbers(tensor)}
    return _collect({name: tensors[name] for name in names if name in tensors}, whole, "the model")


def of_contents(contents: Contents, names: Sequence[str], *, whole: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers of a checkpoint: only the pages of the tensors asked for are read."""
    chosen = {name: contents.rows[name] for name in names if name in contents.rows}
    state = loading.on_meta(Contents(contents.path, contents.format, chosen))  # each is mapped in its turn
    return _collect(state.tensors, whole, f"{contents.path}: what its tensors view")


def _has_numbers(tensor: torch.Tensor) -> bool:
    """Whether a tensor has one number for each element: a lazy one has none, a sparse one some."""
    return not is_lazy(tensor) and not is_composite(tensor)


def _collect(tensors: Mapping[str, torch.Tensor], whole: bool, what: str) -> tuple[dict[str, Any], dict[str, str]]:
    lists: dict[str, Any] = {}
    texts: dict[str, str] = {}
    budget, windows = budget_of(tensors.values(), what), near_windows(in_part=not whole)
    for name, tensor in tensors.items():
        budget.spend(NUMBER * (tensor.numel() if whole else min(tensor.numel(), MOST)), name)
        if tensor.is_meta:
            tensor = real_tensor(tensor, windows)
        if tensor.is_complex() and whole:
            raise RequestError(f"{name} is complex, and JSON has no complex numbers", "-f table shows them")
        if whole:
            lists[name] = tensor.tolist()
        texts[name] = text_of(tensor)
    return lists, texts


def text_of(tensor: torch.Tensor) -> str:
    """`[[0.1372,-0.0214],[...]]`: four significant digits, the middle of long axes left out."""
    return _nested(tensor, _edges(tuple(tensor.shape)))


def _edges(shape: Shape) -> list[tuple[int, int]]:
    """How many of the first and of the last along each axis are shown.

    Of the outermost axes only the first, where that would be more numbers than a cell can be read with.
    """
    if prod(shape) <= WHOLE:
        return [(size, 0) for size in shape]
    edges = [(EDGE, EDGE) if size > 2 * EDGE else (size, 0) for size in shape]
    for axis in range(len(shape)):
        if prod(map(sum, edges)) <= MOST:
            break
        edges[axis] = (1, 0)
    return edges


def _nested(tensor: torch.Tensor, edges: Sequence[tuple[int, int]]) -> str:
    if all(first + last == size for (first, last), size in zip(edges, tensor.shape, strict=True)):
        return _whole(tensor.tolist())
    (first, last), *inner = edges
    size = len(tensor)
    parts = [_nested(tensor[index], inner) for index in range(first)]
    if first + last < size:
        parts.append("...")
    parts += [_nested(tensor[index], inner) for index in range(size - last, size)]
    return "[" + ",".join(parts) + "]"


def _whole(value: Any) -> str:
    return "[" + ",".join(map(_whole, value)) + "]" if isinstance(value, list) else _number(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | complex) else str(value)
