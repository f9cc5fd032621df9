"""By how much the numbers of two tensors differ: one pass over both, a bounded piece of them at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from modelcli.checkpoints import CompositeEntry, Contents, Storage, TensorEntry
from modelcli.errors import RequestError
from modelcli.live import apart, composites, loading
from modelcli.live.describe import dtype_name, walk
from modelcli.live.opening import Live
from modelcli.live.sources import (
    COUNTED,
    Computed,
    Drawn,
    Value,
    budget_of,
    dtype_of,
    extent,
    is_composite,
    is_lazy,
    named_tensors,
    near_windows,
    real_tensor,
    source_of,
)
from modelcli.live.stats import CHUNK, INTEGERS, is_known

#: Dtypes that torch brings to float64 by itself, an element at a time.
_PROMOTED = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
#: An entry of a file, or a tensor of a live model that no file holds.
Entry = TensorEntry | torch.Tensor


def entries_of(live: Live) -> dict[str, TensorEntry | CompositeEntry | torch.Tensor]:
    """The numbers of a live model: as entries where they lie in files, so that their bytes can be compared.

    Quantized and sparse ones are entries in any case: their parts are compared. Left out are tensors without numbers:
    lazy ones, and meta tensors that nothing says the source of.
    """
    found: dict[str, TensorEntry | CompositeEntry | torch.Tensor] = {}
    for name, tensor in named_tensors(live.module).items():
        if is_lazy(tensor):
            continue
        if is_composite(tensor):
            if (entry := composites.held(name, tensor)) is not None:
                found[name] = entry
            continue
        source = source_of(tensor)
        if source is None:
            continue
        if isinstance(source, Value | Drawn | Computed):
            found[name] = tensor
        else:
            found[name] = _entry(tensor, source)
    for path, module in walk(live.module):
        for own_name, entry in composites.kept(module):
            found[f"{path}.{own_name}" if path else own_name] = entry
    return found | apart.of(live.module).tensors


def _entry(tensor: torch.Tensor, storage: Storage) -> TensorEntry:
    return TensorEntry(
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        stride=tuple(tensor.stride()),
        offset=int(tensor.storage_offset()),
        storage=storage,
    )


def largest(pairs: Mapping[str, tuple[Entry, Entry]], progress: Callable[[int], None]) -> dict[str, float | None]:
    """`max |a - b|` of two tensors of one shape, by their name: 0 where they show the same.

    Of floating-point numbers the difference is that of float64, of whole ones it is exact, of complex ones its
    absolute value. Elements are the same where both are NaN; where one is, the largest difference is NaN. It is None
    where torch knows no numbers of a dtype (float4_e2m1fn_x2): such bytes differ. `progress` is told of so
    many bytes more of the first ones.
    """
    found: dict[str, float | None] = {}
    sides = [_tensors({name: pair[number] for name, pair in pairs.items()}) for number in (0, 1)]
    budget = budget_of((tensor for side in sides for tensor in side.values()), "what the tensors of both models view")
    windows = near_windows(), near_windows()
    for name in pairs:
        if name not in sides[0] or name not in sides[1]:
            found[name] = None
            continue
        one, other = _without_repeats(sides[0][name].detach(), sides[1][name].detach())
        most: float = 0
        for number, (left, right) in enumerate(_pieces(one, other)):
            # A piece takes a while by itself: many may be made of few elements far apart.
            budget.spend(COUNTED * (left.numel() + (CHUNK // 256 if number else 0)), name)
            here = _difference(real_tensor(left, windows[0]), real_tensor(right, windows[1]))
            most = here if math.isnan(here) or here > most else most
            progress(left.nbytes)
        found[name] = most
    return found


def _tensors(entries: Mapping[str, Entry]) -> dict[str, torch.Tensor]:
    """Those whose dtype torch knows as numbers; the ones of files on the meta device, each with its source."""
    in_files = {}
    for name, entry in entries.items():
        if isinstance(entry, TensorEntry):
            try:
                dtype_of(entry.dtype)
            except RequestError:
                continue
            in_files[name] = entry
    found = loading.on_meta(Contents(Path(), "", in_files)).tensors
    found |= {name: entry for name, entry in entries.items() if isinstance(entry, torch.Tensor)}
    return {name: tensor for name, tensor in found.items() if is_known(tensor.dtype)}


def _without_repeats(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views in which what both repeat along an axis stands once."""
    for axis, size in enumerate(one.size()):
        if size > 1 and not one.stride(axis) and not other.stride(axis):
            one, other = one.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
    return one, other


def _pieces(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of the same elements of both; neither has, or spans, more than CHUNK elements of its storage."""
    if max(one.numel(), extent(one), extent(other)) <= CHUNK:
        if one.numel():
            yield one, other
        return
    wider = one if extent(one) >= extent(other) else other
    axis = max((axis for axis in range(one.dim()) if one.size(axis) > 1), key=wider.stride)
    size = one.size(axis)
    step = max(1, min(CHUNK // max(wider.stride(axis), 1), (size + 1) // 2))
    for start in range(0, size, step):
        length = min(step, size - start)
        yield from _pieces(one.narrow(axis, start, length), other.narrow(axis, start, length))


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two real tensors."""
    kinds = {one.dtype, other.dtype}
    if kinds <= INTEGERS and (torch.uint64 not in kinds or len(kinds) == 1):
        return _whole_difference(one, other)
    if not kinds <= _PROMOTED:
        wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
        one, other = one.to(wide), other.to(wide)
    apart = (one - other).abs() if one.is_complex() else one.to(torch.float64, copy=True).sub_(other)
    most = _furthest(apart)
    if not math.isnan(most):
        return most
    # Infinities take away from one another to NaN, too.
    return _furthest(apart.masked_fill_(_same(one, other), 0))


def _same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Which elements are the same: equal, or both NaN; of complex ones each of their two parts."""
    if not (one.is_complex() or other.is_complex()):
        return (one == other) | (one.isnan() & other.isnan())
    return _same(one.real, other.real) & _same(_imaginary(one), _imaginary(other))


def _imaginary(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.imag if tensor.is_complex() else torch.zeros_like(tensor)


def _furthest(apart: torch.Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    low, high = torch.aminmax(apart)
    return max(-low.item(), high.item()) if not low.isnan() else math.nan


def _whole_difference(one: torch.Tensor, other: torch.Tensor) -> int:
    """The largest difference of whole numbers, exactly: one of int64 may need 65 bits."""
    left, right = (_as_int64(tensor) for tensor in (one, other))
    apart = torch.maximum(left, right) - torch.minimum(left, right)
    wrapped = apart[apart < 0]  # from 2^63 on
    if wrapped.numel():
        return int(wrapped.max()) + 2**64
    return int(apart.max())


def _as_int64(tensor: torch.Tensor) -> torch.Tensor:
    """Whole numbers as int64; those of uint64 less 2^63 each, which leaves their differences as they are."""
    if tensor.dtype is torch.uint64:
        return tensor.view(torch.int64) ^ -(2**63)
    return tensor.to(torch.int64)
