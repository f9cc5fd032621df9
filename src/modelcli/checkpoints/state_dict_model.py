"""What a checkpoint holds, as a state-dict model: for a file that records no architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry, info_of
from modelcli.checkpoints.limits import Budget
from modelcli.checkpoints.record import Record
from modelcli.errors import RequestError
from modelcli.model.state_dict import (
    MAX_MODULE_DEPTH,
    Entry,
    StateDictModel,
    StateDictModule,
    StateDictTensor,
    of_entries,
)
from modelcli.model.tensors import TensorInfo

#: What was read within the limits of its file may be looked through.
_PLENTY = 1 << 40


@dataclass(frozen=True, eq=False, slots=True)
class Inert:
    """An entry of a file that is no view into one storage, or no tensor."""

    value: Any

    @property
    def view(self) -> object | None:
        return self.value.view if isinstance(self.value, CompositeEntry) else None

    def info(self, name: str, original: str) -> TensorInfo | None:
        """A quantized or sparse tensor as a blueprint has it; None for what is no tensor."""
        return info_of(name, self.value, original) if isinstance(self.value, CompositeEntry) else None

    def inner(self, name: str) -> Iterator[tuple[TensorInfo, object]]:
        """The tensors in a list, a tuple or a dict; nothing says of them that they are trained."""
        if isinstance(self.value, CompositeEntry):
            return
        from modelcli.checkpoints.torch_pickle.nested_tensors import tensors_within

        found, _ = tensors_within({name: self.value}, (), "the model", Budget("the model", _PLENTY))
        for inner_name, entry in found.items():
            info = info_of(inner_name, entry, inner_name)
            if not info.shape and not info.dtype.startswith("q"):
                info = replace(info, kind="buffer")  # a scale or a zero point
            yield replace(info, requires_grad=None), entry.view


def model_of(contents: Contents, record: Record | None = None) -> StateDictModel:
    """The state-dict model of a file; `record` is its own account, where that is believed: it says what is frozen.

    Raises RequestError for names that are nested deeper than PyTorch could have them.
    """
    if any(name.count(".") > MAX_MODULE_DEPTH for name in (*contents.tensors, *contents.extras)):
        raise RequestError(
            f"the names in {contents.path} are nested deeper than {MAX_MODULE_DEPTH}: they can only be shown"
        )
    model = of_entries(_entries(contents), StateDictModule)
    return model if record is None else with_flags(model, record)


def _entries(contents: Contents) -> dict[str, Entry]:
    """The plain tensors first, then those that are none, then all other entries."""
    found: dict[str, Entry] = {}
    infos = contents.infos()
    for name, entry in contents.tensors.items():
        if isinstance(entry, TensorEntry):
            info = infos[name]
            if info.tied_to is not None:
                found[name] = found[info.tied_to]
                continue
            flag = info.requires_grad if info.kind == "parameter" else None
            made = StateDictTensor(
                len(found), entry.shape, entry.dtype, entry.stride, entry.offset, entry.storage, info.kind
            )
            found[name] = made if flag is None else made.trained(flag)
    for name, value in (*contents.tensors.items(), *contents.extras.items()):
        if name not in found:
            found[name] = Inert(value)
    return found


def with_flags(model: StateDictModel, record: Record) -> StateDictModel:
    """The model with every flag as a record has it: the parameters that it names are frozen, all others are trained.

    Of those that it lists without a flag nothing is known, and a record of them knows no more.
    """
    frozen = set(record.frozen)
    unknown = {info.name for info in record.blueprint.tensors if info.kind == "parameter" and info.is_trained is None}
    flags: dict[int, bool | None] = {}
    for name, tensor in model.tensors.items():
        if tensor.kind == "parameter" and tensor.identity not in flags:
            flags[tensor.identity] = None if name in unknown else name not in frozen
    entries: dict[str, Entry] = {
        name: entry.trained(flags[entry.identity])
        if isinstance(entry, StateDictTensor) and entry.identity in flags
        else entry
        for name, entry in model.entries.items()
    }
    return StateDictModel(entries, model.modules)


__all__ = ["Inert", "model_of", "with_flags"]
