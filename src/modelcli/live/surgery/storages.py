"""The storages of a model, and who views them: tensors that share one get new numbers together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from modelcli.live.meta_models import tagged
from modelcli.live.sources import AnySource, extent, is_lazy, named_tensors, real_storage, require_source
from modelcli.model.shared_bytes import Shown


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


def shown_by(module: nn.Module) -> dict[str, Shown]:
    """What each parameter and buffer shows of a storage, under every name."""
    found = {}
    for name, tensor in named_tensors(module).items():
        if has_storage(tensor) and tensor.numel():
            found[name] = Shown(id(tensor), key_of(tensor), *byte_span(tensor))
        else:
            found[name] = Shown(id(tensor), None)
    return found


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
