"""Join tensors on the meta device with `torch.cat` and `torch.stack` so that the result knows where its bytes lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from modelcli.checkpoints.storage import JoinedSpan
from modelcli.live.sources import AnySource, row_major, source_of, tag

#: A tensor that is joined of more pieces than this is computed instead: each piece is an object in memory.
MAX_PIECES = 100_000


class JoinsKeepSources(TorchFunctionMode):
    """In the block, `torch.cat` and `torch.stack` of meta tensors give tensors whose bytes are those of their parts.

    Views (`chunk`, `split`, `transpose`, ...) keep their sources without this. What any other function returns has no
    source: see `sources.Computed` for those.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.stack) and isinstance(result, torch.Tensor) and result.is_meta:
            tensors, axis = _arguments(args, kwargs or {})
            _tag_joined(result, tensors, axis, stacked=func is torch.stack)
        return result


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], int]:
    """The tensors and the axis of a call of `torch.cat` or `torch.stack`."""
    tensors = args[0] if args else kwargs["tensors"]
    axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    return list(tensors), int(axis)


def _tag_joined(result: torch.Tensor, tensors: Sequence[torch.Tensor], axis: int, *, stacked: bool) -> None:
    """Give the result of a join its source: of every part in turn, what lies behind one index of the axes before."""
    if any(source_of(tensor) is None or tensor.dtype != result.dtype for tensor in tensors):
        return
    axis = axis % result.dim()
    if not stacked:
        tensors = [tensor for tensor in tensors if tensor.dim() == result.dim()]  # `cat` skips empty 1-D tensors
    outer = math.prod(result.shape[:axis])
    if not result.numel() or outer * len(tensors) > MAX_PIECES:
        return
    sources = [row_major(tensor) for tensor in tensors]
    lengths = [source.nbytes // outer for source in sources]
    pieces: list[AnySource] = [
        source.part(index * length, length)
        for index in range(outer)
        for source, length in zip(sources, lengths, strict=True)
        if length
    ]
    tag(result, pieces[0] if len(pieces) == 1 else JoinedSpan(tuple(pieces)))
