"""The storages of a model and the tensors that view them. Tensors that share a storage get new values together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from modelcli.live.meta_models import tagged
from modelcli.live.sources import AnySource, extent, is_lazy, named_tensors, real_storage, require_source
from modelcli.model.shared_bytes import Shown


def key_of(tensor: torch.Tensor) -> int:
    """Return a key that is equal for tensors that view the same storage."""
    return int(tensor.untyped_storage()._cdata)


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a plain view of a storage: not lazy, not sparse, not quantized."""
    return not (is_lazy(tensor) or tensor.is_quantized) and tensor.layout == torch.strided


def viewers(module: nn.Module) -> dict[int, list[torch.Tensor]]:
    """Return the parameters and buffers that view each storage, by its key; each tensor once."""
    found: dict[int, dict[int, torch.Tensor]] = {}
    for tensor in named_tensors(module).values():
        if has_storage(tensor):
            found.setdefault(key_of(tensor), {})[id(tensor)] = tensor
    return {key: list(tensors.values()) for key, tensors in found.items()}


def byte_span(view: torch.Tensor) -> tuple[int, int]:
    """Return the range of bytes (start, end) that a tensor uses in its storage."""
    start = int(view.storage_offset())
    return start * view.element_size(), (start + extent(view)) * view.element_size()


def shown_by(module: nn.Module) -> dict[str, Shown]:
    """Return the bytes that each parameter and buffer uses of its storage, under every name."""
    found = {}
    for name, tensor in named_tensors(module).items():
        if has_storage(tensor) and tensor.numel():
            found[name] = Shown(id(tensor), key_of(tensor), *byte_span(tensor))
        else:
            found[name] = Shown(id(tensor), None)
    return found


def replace_storage(tensors: Sequence[torch.Tensor], source: AnySource, dtype: torch.dtype | None = None) -> None:
    """Make tensors that share a storage view the bytes of a source instead, at the same offsets.

    The tensor objects stay the same, so ties and flags are preserved; their old data is not written to.

    Args:
        tensors: all tensors that view the storage.
        source: the new bytes. On the meta device they are made when needed, else at once.
        dtype: the new dtype of the tensors, if it changes.
    """
    device = tensors[0].device
    storage = tagged(source.nbytes, source) if tensors[0].is_meta else real_storage(source).to(device=device)
    for tensor in tensors:
        data = torch.empty(0, dtype=dtype or tensor.dtype, device=device)
        tensor.data = data.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def copied(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Return a copy, in memory, of a tensor's storage, with the bytes read from its source."""
    copy: torch.UntypedStorage = real_storage(require_source(tensor)).cpu().clone()
    return copy
