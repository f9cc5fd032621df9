"""Read the record of a file, and the further names of its tied tensors."""

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

#: The keys of safetensors' `__metadata__`, or of an index, that describe the file. A tied tensor with such a name has
#: its other name only in the record.
RESERVED = frozenset(("format", "total_size", "total_parameters", records.SAFETENSORS_KEY))


@dataclass(frozen=True)
class FoundRecord:
    """The record in the texts of a file.

    Attributes:
        record: a complete record.
        of_keys: a record that needs the file's tensors for its blueprint: `completed` makes it `Contents.record`.
        notes: why there is no record, if there is none.
    """

    record: records.Record | None = None
    of_keys: records.RecordOfKeys | None = None
    notes: tuple[str, ...] = ()

    def completed(self, contents: Contents) -> Contents:
        """Return the contents of the file, with the record that its tensors complete, if it has one."""
        return contents if self.of_keys is None else contents.with_record_of_keys(self.of_keys)


def record_in(texts: Iterable[object], path: Path) -> FoundRecord:
    """Return the first of the texts that is a record; if none is, a note that says why.

    Raises FileFormatError if a record describes far more than its size allows.
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
    """Return the further names of tied tensors, each with the name under which its tensor is stored.

    `safetensors.torch.save_model` writes them into `__metadata__`, where other texts may happen to be the name of a
    tensor (`"target": "clip_l"`). A text counts as a further name if the record says so, or if both names end alike:
    `lm_head.weight` for `embed_tokens.weight`.
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
    """Whether both names are those of tensors in modules and end alike: `decoder.weight` and `encoder.0.weight`."""
    (path, _, own), (other_path, _, other_own) = name.rpartition("."), other.rpartition(".")
    return bool(path and other_path) and own == other_own


def in_order_of(
    record: records.Record | None, tensors: dict[str, TensorEntry | CompositeEntry]
) -> dict[str, TensorEntry | CompositeEntry]:
    """Return the tensors in the model's order, tied ones under all their names. The file has each once."""
    if record is None:
        return tensors
    found = {}
    for info in record.blueprint.tensors:
        entry = tensors.get(info.name) or tensors.get(info.identity)
        if info.persistent and entry is not None and (entry.shape, entry.dtype) == (info.shape, info.dtype):
            found[info.name] = entry
    return found | {name: entry for name, entry in tensors.items() if name not in found}


def _shown(module: ModuleInfo) -> int:
    """Return the characters that showing a module takes besides its path and settings: class and indentation."""
    lines = module.config.count("\n") + (module.own_repr or "").count("\n")
    return len(module.type or "") + 2 * module.depth * lines
