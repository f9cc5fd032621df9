"""Make a state-dict model from the contents of a checkpoint whose architecture is not known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

#: A budget that is never used up: the reader has already checked the limits of the file.
_UNLIMITED = 1 << 40


@dataclass(frozen=True, eq=False, slots=True)
class Inert:
    """An entry of a file that is not a plain tensor."""

    value: Any

    @property
    def view(self) -> object | None:
        return self.value.view if isinstance(self.value, CompositeEntry) else None

    def info(self, name: str, original: str) -> TensorInfo | None:
        """Return a quantized or sparse tensor as a blueprint describes it; None for an entry that is not a tensor."""
        return info_of(name, self.value, original) if isinstance(self.value, CompositeEntry) else None

    def inner(self, name: str) -> Iterator[tuple[TensorInfo, object]]:
        """Yield the tensors in a list, tuple or dict. Whether they are trained is not known."""
        if isinstance(self.value, CompositeEntry):
            return
        from modelcli.checkpoints.torch_pickle.nested_tensors import tensors_within

        found, _ = tensors_within({name: self.value}, (), "the model", Budget("the model", _UNLIMITED))
        for inner_name, entry in found.items():
            info = info_of(inner_name, entry, inner_name)
            if not info.shape and not info.dtype.startswith("q"):
                info = replace(info, kind="buffer")  # a scale or a zero point
            yield replace(info, requires_grad=None), entry.view


def model_of(contents: Contents, record: Record | None = None) -> StateDictModel:
    """Return the state-dict model of a checkpoint.

    Args:
        contents: the checkpoint.
        record: its record, which states the frozen parameters; None if it has none or it is not to be trusted.

    Raises:
        RequestError: names are nested deeper than PyTorch allows.
        FileFormatError: the names describe far more modules than their size allows.
    """
    if any(name.count(".") > MAX_MODULE_DEPTH for name in (*contents.tensors, *contents.extras)):
        raise RequestError(
            f"the names in {contents.path} are nested deeper than {MAX_MODULE_DEPTH}, which PyTorch cannot have in a "
            "model: modelcli can only show them"
        )
    infos = contents.infos()
    model = of_entries(_entries(contents, infos), StateDictModule, contents.pay_for_modules())
    if record is not None:
        return with_flags(model, record)
    if not model.inert and all(info.tied_to is None and info.requires_grad is None for info in infos.values()):
        return StateDictModel(model.entries, model.modules, described=infos)
    return model


def _entries(contents: Contents, infos: Mapping[str, TensorInfo]) -> dict[str, Entry]:
    """Return the plain tensors, then the other tensors, then all other entries."""
    found: dict[str, Entry] = {}
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
    if len(found) < len(contents.tensors) or contents.extras:
        for name, value in (*contents.tensors.items(), *contents.extras.items()):
            if name not in found:
                found[name] = Inert(value)
    return found


def with_flags(model: StateDictModel, record: Record) -> StateDictModel:
    """Return the model with the flags of a record: the parameters that it names are frozen, all others trained.

    The flag of a parameter that the record lists without a flag stays unknown.
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
