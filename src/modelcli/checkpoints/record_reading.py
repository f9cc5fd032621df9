"""What a file carries beside its tensors: the record, read no further than its size warrants, and further names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcli.checkpoints import limits, strict_json
from modelcli.checkpoints import record as records
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.model.blueprint import ModuleInfo

#: What safetensors' `__metadata__`, or that of an index, says by these names is about the file. A tied tensor that is
#: called so has its other name in the record alone.
RESERVED = frozenset(("format", "total_size", "total_parameters", records.SAFETENSORS_KEY))


@dataclass(frozen=True)
class FoundRecord:
    """What the texts of a file say of its origin.

    `of_keys` is a record whose blueprint the file's tensors give: `completed` makes it `Contents.record`. `record` is
    one that is whole by itself. `notes` are what there is to tell where no text is either.
    """

    record: records.Record | None = None
    of_keys: records.RecordOfKeys | None = None
    notes: tuple[str, ...] = ()

    def completed(self, contents: Contents) -> Contents:
        """What a file holds, with the record that is made of its tensors where the file has such a one."""
        return contents if self.of_keys is None else contents.with_record_of_keys(self.of_keys)


def record_in(texts: Iterable[object], path: Path) -> FoundRecord:
    """The record that the first of these texts is that is one.

    Raises FileFormatError where far more comes of a text than it could spell out.
    """
    wrong = []
    for text in texts:
        if not isinstance(text, str):
            continue
        budget = limits.Budget(f"{path}: its record", len(text))
        strict_json.pay_for(text, budget)
        try:
            found = records.read(text)
        except records.DamagedError as error:
            wrong.append(str(error))
            continue
        if isinstance(found, records.RecordOfKeys):
            return FoundRecord(of_keys=found)
        for module in found.blueprint.modules:
            budget.spend(_shown(module))
        return FoundRecord(found)
    return FoundRecord(notes=tuple(f"the record in {path.name} was ignored: {why}" for why in wrong[:1]))


def aliases_in(
    metadata: Mapping[str, Any], tensors: Mapping[str, Any], record: records.Record | None
) -> dict[str, str]:
    """The other names of tied tensors, each with the one that its tensor is stored under.

    `safetensors.torch.save_model` writes them among the texts of `__metadata__`, where nothing tells them from a text
    that happens to be the name of a tensor (`"target": "clip_l"`). One is taken for a name where the record says so, or
    where both are tensors of modules that have the same name in theirs: `lm_head.weight` for `embed_tokens.weight`.
    """
    tied = {} if record is None else {info.name: info.identity for info in record.blueprint.tensors}
    return {
        name: first
        for name, first in metadata.items()
        if isinstance(first, str)
        and first in tensors
        and name not in tensors
        and name not in RESERVED
        and (_are_tied(name, first, tied) or _have_one_own_name(name, first))
    }


def _are_tied(name: str, other: str, identities: Mapping[str, str]) -> bool:
    return name in identities and identities[name] == identities.get(other)


def _have_one_own_name(name: str, other: str) -> bool:
    """Whether two names are those of tensors in modules, and end alike: `decoder.weight` and `encoder.0.weight`."""
    (path, _, own), (other_path, _, other_own) = name.rpartition("."), other.rpartition(".")
    return bool(path and other_path) and own == other_own


def in_order_of(
    record: records.Record | None, tensors: dict[str, TensorEntry | CompositeEntry]
) -> dict[str, TensorEntry | CompositeEntry]:
    """The tensors in the model's order, those that are tied under all their names: the file holds each once."""
    if record is None:
        return tensors
    found = {}
    for info in record.blueprint.tensors:
        entry = tensors.get(info.name) or tensors.get(info.identity)
        if info.persistent and entry is not None and (entry.shape, entry.dtype) == (info.shape, info.dtype):
            found[info.name] = entry
    return found | {name: entry for name, entry in tensors.items() if name not in found}


def _shown(module: ModuleInfo) -> int:
    """What a module takes on a screen beyond its path and settings: its class, and the indentation of its lines."""
    lines = module.config.count("\n") + (module.own_repr or "").count("\n")
    return len(module.type or "") + 2 * module.depth * lines
