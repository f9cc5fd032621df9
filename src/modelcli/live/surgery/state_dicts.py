"""Convert between state-dict models and torch: tensors of a file on meta, and new modules as entries."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from modelcli.live import apart, composites
from modelcli.live.describe import describe, dtype_name
from modelcli.live.inert import inert_of
from modelcli.live.meta_models import tagged
from modelcli.live.sources import (
    AnySource,
    dtype_of,
    flag_of,
    is_composite,
    is_lazy,
    named_tensors,
    set_flag,
    source_of,
)
from modelcli.live.surgery.core import brief, count
from modelcli.live.surgery.storages import key_of
from modelcli.model.paths import parent_of
from modelcli.model.state_dict import Entry, NewModule, StateDictModel, StateDictModule, StateDictTensor
from modelcli.model.tensors import TensorInfo
from modelcli.values.state_dict_sources import Sources


def viewing(model: StateDictModel, names: Iterable[str]) -> list[str]:
    """These tensors, and all others that view a storage of one of them."""
    storages = {model.tensors[name].storage for name in names}
    return [name for name, tensor in model.tensors.items() if tensor.storage in storages]


def meta_tensors(model: StateDictModel, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return tensors of a state-dict model on the meta device, with the sources of their bytes.

    Tied tensors are one object, tensors that share a storage share one on meta too; parameters have their flags.
    """
    sources, storages = Sources(), dict[object, torch.UntypedStorage]()
    made: dict[int, torch.Tensor] = {}
    for name in names:
        tensor = model.tensors[name]
        if tensor.identity not in made:
            made[tensor.identity] = _meta_tensor(name, tensor, sources, storages)
    return {name: made[model.tensors[name].identity] for name in names}


def _meta_tensor(
    name: str, tensor: StateDictTensor, sources: Sources, storages: dict[object, torch.UntypedStorage]
) -> torch.Tensor:
    if tensor.shape is None:
        make: Any = nn.parameter.UninitializedParameter
        lazy: torch.Tensor = make(device="meta", dtype=dtype_of(tensor.dtype))
        return lazy
    if tensor.storage not in storages:
        source: Any = sources.of(name, tensor)
        storages[tensor.storage] = tagged(source.nbytes, source)
    found = torch.empty(0, dtype=dtype_of(tensor.dtype), device="meta")
    found.set_(storages[tensor.storage], tensor.offset, tensor.shape, tensor.stride)
    if tensor.kind == "parameter":
        found = nn.Parameter(found, requires_grad=False)
        set_flag(found, tensor.requires_grad)
    return found


@dataclass(frozen=True, eq=False)
class Made:
    """An entry of a new module that is no plain tensor."""

    name: str
    made: Any
    told: TensorInfo | None

    @property
    def value(self) -> Any:
        if isinstance(self.made, torch.Tensor) and is_composite(self.made):
            return composites.planned(self.made, composites.planned_here)
        return inert_of(self.name, self.made, composites.planned_here)

    @property
    def view(self) -> object | None:
        return id(self.made)

    def info(self, name: str, original: str) -> TensorInfo | None:
        """The tensor as a blueprint has it; None for what is no tensor."""
        if self.told is None:
            return None
        return replace(self.told, name=name, tied_to=None if original == name else original)

    def inner(self, name: str) -> list[tuple[TensorInfo, object]]:
        """The tensors in an entry that is no tensor."""
        found = apart.inner_of(self.name, self.made) if self.told is None else []
        return [(replace(info, name=name + info.name.removeprefix(self.name)), view) for info, view in found]


def new_module(new: nn.Module, first_identity: int) -> NewModule:
    """A new module as what a state-dict model holds of it; its tensors are numbered from `first_identity` on."""
    blueprint = describe(new)
    tensors, infos = named_tensors(new), blueprint.by_name
    identities: dict[int, int] = {}
    sources: dict[int, AnySource | None] = {}
    own: dict[str, list[tuple[str, Entry]]] = {module.path: [] for module in blueprint.modules}
    for name, tensor in tensors.items():
        info, own_name = infos[name], name.rpartition(".")[2]
        if not is_lazy(tensor) and is_composite(tensor):
            own[parent_of(name)].append((own_name, Made(name, tensor, info)))
            continue
        own[parent_of(name)].append(
            (
                own_name,
                _entry(tensor, info, identities.setdefault(id(tensor), first_identity + len(identities)), sources),
            )
        )
    for name, value in _others(new, tensors).items():
        own[parent_of(name)].append((name.rpartition(".")[2], Made(name, value, infos.get(name))))
    parts = []
    for described in blueprint.modules:
        module = _at(new, described.path)
        known = StateDictModule(None, module._version, described, brief(module), module)
        parts.append((described.path, known, tuple(own[described.path])))
    return NewModule(tuple(parts), brief(new), count(new), len(identities))


def _others(new: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What else stands in the state dict of a new module."""
    if not apart.may_write_more(new):
        return {}
    state: Mapping[str, Any] = new.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if name not in tensors}


def _entry(
    tensor: torch.Tensor, info: TensorInfo, identity: int, sources: dict[int, AnySource | None]
) -> StateDictTensor:
    flag = flag_of(tensor) if info.kind == "parameter" else None
    if is_lazy(tensor):
        return StateDictTensor(identity, None, info.dtype, (), 0, None, info.kind, flag, info.persistent)
    source: Any = None
    if not hasattr(tensor, "__tensor_flatten__"):
        source = sources.setdefault(key_of(tensor), source_of(tensor))
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    offset = int(tensor.storage_offset())
    dtype = dtype_name(tensor.dtype)
    return StateDictTensor(identity, shape, dtype, stride, offset, source, info.kind, flag, info.persistent)


def _at(module: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        child = module._modules[name]
        assert child is not None
        module = child
    return module


__all__ = ["Made", "meta_tensors", "new_module", "viewing"]
