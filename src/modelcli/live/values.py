"""The numbers of tensors, to be shown: whole for a program, in one short line for a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from modelcli.checkpoints import Contents
from modelcli.errors import RequestError
from modelcli.live import loading
from modelcli.live.opening import Live
from modelcli.live.sources import is_composite, is_lazy, named_tensors, real_tensor

#: Up to this many numbers are shown whole; of more, the first and the last three along each axis.
WHOLE = 24
EDGE = 3


def of_live(live: Live, names: Sequence[str], *, whole: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers of a live model: drawn or read only for the tensors asked for."""
    tensors = {name: tensor for name, tensor in named_tensors(live.module).items() if _has_numbers(tensor)}
    return _collect(((name, tensors[name]) for name in names if name in tensors), whole)


def of_contents(contents: Contents, names: Sequence[str], *, whole: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers of a checkpoint: only the pages of the tensors asked for are read."""
    chosen = {name: contents.tensors[name] for name in names if name in contents.tensors}
    state = loading.on_meta(Contents(contents.path, contents.format, chosen))  # each is mapped in its turn
    return _collect(state.tensors.items(), whole)


def _has_numbers(tensor: torch.Tensor) -> bool:
    """Whether a tensor has one number for each element: a lazy one has none, a sparse one some."""
    return not is_lazy(tensor) and not is_composite(tensor)


def _collect(tensors: Iterable[tuple[str, torch.Tensor]], whole: bool) -> tuple[dict[str, Any], dict[str, str]]:
    lists: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for name, tensor in tensors:
        if tensor.is_meta:
            tensor = real_tensor(tensor)
        if tensor.is_complex() and whole:
            raise RequestError(f"{name} is complex, and JSON has no complex numbers", "-f table shows them")
        if whole:
            lists[name] = tensor.tolist()
        texts[name] = text_of(tensor)
    return lists, texts


def text_of(tensor: torch.Tensor) -> str:
    """`[[0.1372,-0.0214],[...]]`: four significant digits, the middle of long axes left out."""
    return _nested(tensor, cut=tensor.numel() > WHOLE)


def _nested(tensor: torch.Tensor, *, cut: bool) -> str:
    if tensor.dim() == 0:
        return _number(tensor.item())
    size = tensor.shape[0]
    if cut and size > 2 * EDGE:
        parts = [_nested(tensor[index], cut=cut) for index in range(EDGE)]
        parts += ["..."]
        parts += [_nested(tensor[index], cut=cut) for index in range(size - EDGE, size)]
    else:
        parts = [_nested(tensor[index], cut=cut) for index in range(size)]
    return "[" + ",".join(parts) + "]"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | complex) else str(value)
