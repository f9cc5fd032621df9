"""The storages of a model, and who views them: tensors that share one get new numbers together."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Sequence

import torch
from torch import nn

from modelcli.live.meta_models import tagged
from modelcli.live.sources import AnySource, extent, is_lazy, named_tensors, real_storage, require_source


def key_of(tensor: torch.Tensor) -> int:
    """Equal for tensors that view one storage."""
    return int(tensor.untyped_storage()._cdata)


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a plain view of a storage: not lazy, not sparse, not quantized."""
    return not (is_lazy(tensor) or tensor.is_quantized) and tensor.layout == torch.strided


def viewers(module: nn.Module) -> dict[int, list[torch.Tensor]]:
    """The parameters and buffers that view each storage, by its key; one with several names is there once."""
    found: dict[int, dict[int, torch.Tensor]] = {}
    for tensor in named_tensors(module).values():
        if has_storage(tensor):
            found.setdefault(key_of(tensor), {})[id(tensor)] = tensor
    return {key: list(tensors.values()) for key, tensors in found.items()}


def byte_span(view: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor lies in: the first, and the one after the last."""
    start = int(view.storage_offset())
    return start * view.element_size(), (start + extent(view)) * view.element_size()


def tied(module: nn.Module) -> list[list[str]]:
    """The names of tensors that are one, or that show some of the same bytes: a group for each, in their order.

    Tensors that lie side by side in one storage are not tied; what has no storage of its own is tied to itself alone.
    """
    tensors = named_tensors(module)
    groups: dict[object, list[str]] = {}
    by_storage: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if has_storage(tensor) and tensor.numel():
            by_storage.setdefault(key_of(tensor), []).append(name)
        else:
            groups.setdefault(id(tensor), []).append(name)
    for key, names in by_storage.items():
        reached, number = 0, 0
        for (start, end), name in sorted((byte_span(tensors[name]), name) for name in names):
            number += start >= reached  # behind all before it: the next group
            reached = max(reached, end)
            groups.setdefault((key, number), []).append(name)
    order = {name: position for position, name in enumerate(tensors)}
    return [sorted(names, key=order.__getitem__) for names in groups.values()]


def shown_too(module: nn.Module, names: Collection[str]) -> dict[str, str]:
    """The other tensors that show some of the bytes of these, each with the first of these whose bytes it shows.

    Names of one and the same tensor are no others.
    """
    tensors = named_tensors(module)
    own = {id(tensors[name]) for name in names}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    rest: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if not has_storage(tensor) or not tensor.numel():
            continue
        if name in names:
            spans.setdefault(key_of(tensor), []).append((*byte_span(tensor), name))
        elif id(tensor) not in own:
            rest.setdefault(key_of(tensor), []).append(name)
    found = {}
    for key, others in rest.items():
        if key not in spans:
            continue
        chosen = sorted(spans[key])
        starts = [start for start, _, _ in chosen]
        furthest = list(itertools.accumulate(chosen, _further))
        for name in others:
            start, end = byte_span(tensors[name])
            count = bisect.bisect_left(starts, end)  # of the others none begins before this one ends
            if count and furthest[count - 1][1] > start:
                found[name] = furthest[count - 1][2]
    return found


def _further(first: tuple[int, int, str], second: tuple[int, int, str]) -> tuple[int, int, str]:
    """Of two spans the one that ends later."""
    return second if second[1] > first[1] else first


def view_anew(tensors: Sequence[torch.Tensor], source: AnySource, dtype: torch.dtype | None = None) -> None:
    """Let tensors that share a storage view the bytes of a source in the same places, as `dtype` where one is given.

    On the meta device the bytes are made when they are asked for, else at once. The tensors stay what they are:
    parameters, ties and flags hold, and the numbers that they had are not written into.
    """
    device = tensors[0].device
    storage = tagged(source.nbytes, source) if tensors[0].is_meta else real_storage(source).to(device=device)
    for tensor in tensors:
        data = torch.empty(0, dtype=dtype or tensor.dtype, device=device)
        tensor.data = data.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def copied(tensor: torch.Tensor) -> torch.UntypedStorage:
    """A copy in memory of the storage of a tensor, its bytes read from where they come from."""
    copy: torch.UntypedStorage = real_storage(require_source(tensor)).cpu().clone()
    return copy
