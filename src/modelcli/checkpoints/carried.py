"""The record that a file carries, read no further than its size warrants."""

from __future__ import annotations

from modelcli import record as records
from modelcli.blueprints import ModuleInfo
from modelcli.checkpoints import limits, strict_json


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


def _shown(module: ModuleInfo) -> int:
    """What a module takes on a screen beyond its path and settings: its class, and the indentation of its lines."""
    lines = module.config.count("\n") + (module.own_repr or "").count("\n")
    return len(module.type or "") + 2 * module.depth * lines
