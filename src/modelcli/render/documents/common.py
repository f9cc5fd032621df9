"""Parts that the JSON documents and tables of several commands share."""

from __future__ import annotations

from typing import Any

from modelcli.errors import ModelcliError
from modelcli.model.blueprint import Blueprint
from modelcli.model.totals import Totals
from modelcli.render.views import (
    Column,
)

SCHEMA = 1


def model_of(reference: str, blueprint: Blueprint) -> dict[str, Any]:
    """Return the value of `model` in a JSON document."""
    return {"reference": reference, "class": blueprint.root.type}


def totals_document(totals: Totals) -> dict[str, Any]:
    return {
        "params": totals.params,
        "trainable_params": totals.trainable_params,
        "non_trainable_params": totals.non_trainable_params,
        "buffers": totals.buffers,
        "param_bytes": totals.param_bytes,
        "buffer_bytes": totals.buffer_bytes,
    }


TRAINABLE = Column("trainable", "trainable")


def error_document(error: ModelcliError) -> dict[str, Any]:
    """Return the JSON document of an error."""
    return {"kind": error.kind, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
