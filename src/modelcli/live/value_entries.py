"""The values of a live model as entries, which `modelcli.values` reads: those of a file where they lie in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from modelcli.checkpoints import CompositeEntry, TensorEntry
from modelcli.live import apart, composites
from modelcli.live.describe import dtype_name
from modelcli.live.sources import AnySource, is_composite, is_lazy, named_tensors, source_of

if TYPE_CHECKING:
    from modelcli.live.opening import Live


def of_live(live: Live, names: Sequence[str] | None = None) -> dict[str, TensorEntry | CompositeEntry]:
    """The values of a live model by the names of its tensors, or of those of `names`; nothing is drawn or read yet.

    Left out are tensors without values: lazy ones, meta tensors of which nothing says where theirs come from, and those
    that the library's loader makes anew.
    """
    anew = live.made_anew()
    tensors = {name: tensor for name, tensor in named_tensors(live.module).items() if name not in anew}
    chosen = tensors if names is None else {name: tensors[name] for name in names if name in tensors}
    found: dict[str, TensorEntry | CompositeEntry] = dict(plain(chosen))
    for name, tensor in chosen.items():
        if not is_lazy(tensor) and is_composite(tensor) and (entry := composites.held(name, tensor)) is not None:
            found[name] = entry
    others = apart.of(live.module).tensors
    found |= {name: entry for name, entry in others.items() if names is None or name in names}
    return {name: found[name] for name in (found if names is None else names) if name in found}


def plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorEntry]:
    """Those of tensors that are plain views of a storage whose bytes are known."""
    found: dict[str, TensorEntry] = {}
    sources: dict[int, AnySource] = {}
    for name, tensor in tensors.items():
        if is_lazy(tensor) or is_composite(tensor) or source_of(tensor) is None:
            continue
        if not tensor.is_meta:
            tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        key = tensor.untyped_storage()._cdata
        if key not in sources:
            source = source_of(tensor)
            assert source is not None
            sources[key] = source  # which holds the storage, so that no other one gets its address
        found[name] = _entry(tensor, sources[key])
    return found


def _entry(tensor: torch.Tensor, source: AnySource) -> TensorEntry:
    return TensorEntry(
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        stride=tuple(tensor.stride()),
        offset=int(tensor.storage_offset()),
        storage=source,
    )
