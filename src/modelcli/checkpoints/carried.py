"""What a file carries beside its tensors: the record, read no further than its size warrants, and further names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelcli import record as records
from modelcli.blueprints import ModuleInfo
from modelcli.checkpoints import limits, strict_json
from modelcli.checkpoints.contents import CompositeEntry, TensorEntry

#: What safetensors' `__metadata__`, or that of an index, says by these names is about the file. A tied tensor that is
#: called so has its other name in the record alone.
RESERVED = frozenset(("format", "total_size", "total_parameters", records.SAFETENSORS_KEY))


def record_in(text: object, what: str) -> records.Record | None:
    """The record that a text is; None for anything else. Raises FileFormatError where far more comes of it."""
    if not isinstance(text, str):
        return None
    budget = limits.Budget(f"{what}: its record", len(text))
    strict_json.pay_for(text, budget)
    record = records.from_text(text)
    if record is not None:
        for module in record.blueprint.modules:
            budget.spend(_shown(module))
    return record


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
