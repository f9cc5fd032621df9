"""The record that a written checkpoint carries: which model it is, and what was done to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelcli import blueprints, input_texts
from modelcli.blueprints import Blueprint, TensorInfo
from modelcli.edits import Edit
from modelcli.edits import parse as parse_edit
from modelcli.errors import RequestError

#: Where it stands: a key of `state_dict._metadata`, a zip record under the archive's own prefix, a key of
#: safetensors' `__metadata__`.
METADATA_KEY = ".modelcli"
ZIP_RECORD = ".data/modelcli.json"
SAFETENSORS_KEY = "modelcli"
SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """A model's origin.

    `reference` is None where the architecture was never known. `weights` is torchvision's name of the numbers the
    model started with. `frozen` are the names of the parameters that are not trained. An edit of many matches is many
    lines in `edits`; `numbers` says of each which edit it came of, and `edit_count` how many there were: the number of
    an edit decides what it draws.
    """

    reference: str | None
    weights: str | None
    seed: int
    edits: tuple[str, ...]
    frozen: tuple[str, ...]
    blueprint: Blueprint
    input_size: tuple[tuple[int, ...], ...] | None = None
    input_dtype: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    edit_count: int = 0
    inputs: tuple[str, ...] = ()

    def parsed_edits(self) -> list[Edit]:
        return [parse_edit(line) for line in self.edits]


def to_text(record: Record) -> str:
    """The record as JSON, the same text for the same record."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "reference": record.reference,
        "weights": record.weights,
        "seed": record.seed,
        "edits": list(record.edits),
        "frozen": list(record.frozen),
        "input_size": record.input_size,
        "input_dtype": list(record.input_dtype),
        "numbers": list(record.numbers),
        "edit_count": record.edit_count,
        "blueprint": blueprints.to_json(record.blueprint),
    }
    if record.inputs:
        document["inputs"] = list(record.inputs)
    return json.dumps(document, ensure_ascii=True, separators=(",", ":"))


def from_text(text: str) -> Record | None:
    """Read a record, or None where the text is none: damaged, foreign, or of a later schema."""
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            return None
        edits = _texts(document["edits"])
        for line in edits:
            parse_edit(line)
        seed = document["seed"]
        if type(seed) is not int or not 0 <= seed < 2**63:
            return None
        return Record(
            reference=_optional_text(document["reference"]),
            weights=_optional_text(document["weights"]),
            seed=seed,
            edits=edits,
            frozen=_texts(document["frozen"]),
            blueprint=blueprints.from_json(document["blueprint"]),
            input_size=_sizes(document.get("input_size")),
            input_dtype=_texts(document.get("input_dtype") or []),
            numbers=_numbers(document.get("numbers", [*range(1, len(edits) + 1)]), len(edits)),
            edit_count=_count(document.get("edit_count", len(edits))),
            inputs=_inputs(document.get("inputs")),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, RequestError):
        return None


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("a list of text was expected")
    return tuple(values)


def _inputs(values: object) -> tuple[str, ...]:
    texts = () if values is None else _texts(values)
    input_texts.parse_all(texts)
    return texts


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError("a count was expected")
    return value


def _numbers(values: object, count: int) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError("a number for each edit was expected")
    return tuple(map(_count, values))


def _optional_text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError("text was expected")
    return value


def _sizes(value: object) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise TypeError("a list of shapes was expected")
    return tuple(map(blueprints.shape_from_json, value))


def disagreement(record: Record, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Why a record cannot be believed, or None: its blueprint must list the tensors that the file holds."""
    expected = {t.name: t for t in record.blueprint.tensors if t.persistent}
    if missing := expected.keys() - tensors.keys():
        return f"the file lacks {blueprints.counted(len(missing), 'tensor')} that it lists, such as {min(missing)}"
    if extra := tensors.keys() - expected.keys():
        return f"it lacks {blueprints.counted(len(extra), 'tensor')} of the file, such as {min(extra)}"
    for name, tensor in expected.items():
        found = tensors[name]
        if (tensor.shape, tensor.dtype) != (found.shape, found.dtype):
            return f"{name} is {list(found.shape or ())} {found.dtype} in the file, not as it says"
        if (tensor.layout, tensor.stored_bytes) != (found.layout, found.stored_bytes):
            return f"{name} is stored in another way in the file"
        if tensor.tied_to is None or not tensor.elements:
            continue
        if tensor.tied_to not in tensors or tensors[tensor.tied_to].identity != found.identity:
            return f"{name} and {tensor.tied_to} are two tensors in the file, and one as it says"
    return None
