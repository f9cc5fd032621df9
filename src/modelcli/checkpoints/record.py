"""The record that a written checkpoint carries: which model it is, and what was done to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from modelcli.checkpoints import record_of_keys
from modelcli.checkpoints.record_of_keys import KeysOfFile
from modelcli.errors import RequestError
from modelcli.model import json_form
from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.dtypes import INPUT_DTYPES
from modelcli.model.json_form import shape_from_json
from modelcli.model.tensors import TensorInfo
from modelcli.wording import counted

if TYPE_CHECKING:
    from modelcli.edits import Edit

#: Where it stands: a key of `state_dict._metadata`, a zip record under the archive's own prefix, a key of
#: safetensors' `__metadata__`.
METADATA_KEY = ".modelcli"
ZIP_RECORD = ".data/modelcli.json"
SAFETENSORS_KEY = "modelcli"
SCHEMA = 1
#: The blueprint of a record that was read without the keys of its file.
_ROOT = Blueprint((ModuleInfo("", None),), ())


@dataclass(frozen=True)
class Record:
    """A model's origin.

    `reference` is None where the architecture was never known. `weights` is the library's name of the values the
    model started with. `frozen` are the names of the parameters that are not trained. An edit of many matches is many
    lines in `edits`; `numbers` says of each which edit it came of, and `edit_count` how many there were: the number of
    an edit decides what it draws. `configuration` is the SHA-256 digest of the configuration that was written beside it
    in the folder of a library's model; once that has changed, the record says nothing of the folder.
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
    configuration: str | None = None

    def parsed_edits(self) -> list[Edit]:
        """The edits, for whoever builds the model. Raises RequestError for a line that cannot be read."""
        from modelcli import edits

        return [edits.parse(line) for line in self.edits]

    def unreadable_edit(self) -> str | None:
        """Why its edits cannot be carried out, as a part of a sentence; None where every line can be read."""
        try:
            self.parsed_edits()
        except RequestError as error:
            return _unreadable(error)
        return None


@dataclass(frozen=True)
class RecordOfKeys:
    """A record whose text leaves the blueprint to the keys of its file.

    `record` is all of it but that and the frozen names.
    """

    record: Record
    keys: KeysOfFile

    def beside(self, tensors: Mapping[str, TensorInfo], pay: Callable[[int], None]) -> Record:
        """The whole record, of a file with these tensors. Raises DamagedError where it was written with others."""
        infos = tuple(tensors.values())
        if (why := self.keys.disagreement(infos)) is not None:
            raise DamagedError(why)
        blueprint = self.keys.blueprint(infos, pay)
        frozen = tuple(info.name for info in blueprint.tensors if info.requires_grad is False and not info.tied_to)
        return replace(self.record, blueprint=blueprint, frozen=frozen)


def to_text(record: Record) -> str:
    """The record as JSON, the same text for the same record."""
    return _as_json(record, {"frozen": list(record.frozen), "blueprint": json_form.to_json(record.blueprint)})


def to_text_beside(record: Record, names: Sequence[str]) -> str:
    """The record of a state-dict model as JSON, for a file that gives the model's entries back in this order.

    It leaves the blueprint out where whoever reads the file finds the same one without it.
    """
    known = record.blueprint.by_name
    if record.reference is None and len(names) == len(known) and all(name in known for name in names):
        keys = record_of_keys.keys_of(record.blueprint)
        if keys.gives(record.blueprint, names):
            return _as_json(record, {"keys": keys.to_json()})
    return to_text(record)


def _as_json(record: Record, model: Mapping[str, Any]) -> str:
    """A record as JSON, with what it says of the model's modules and tensors."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "reference": record.reference,
        "weights": record.weights,
        "seed": record.seed,
        "edits": list(record.edits),
        "input_size": record.input_size,
        "input_dtype": list(record.input_dtype),
        "numbers": list(record.numbers),
        "edit_count": record.edit_count,
        **model,
    }
    if record.inputs:
        document["inputs"] = list(record.inputs)
    if record.configuration is not None:
        document["configuration"] = record.configuration
    return json.dumps(document, ensure_ascii=True, separators=(",", ":"))


class DamagedError(ValueError):
    """A text is no record; the message says why, as a part of a sentence."""


def from_text(text: str) -> Record | RecordOfKeys | None:
    """Read a record and every edit in it; None where the text is none: damaged, foreign, or of a later schema."""
    try:
        found = read(text)
    except DamagedError:
        return None
    record = found.record if isinstance(found, RecordOfKeys) else found
    return None if record.unreadable_edit() else found


def read(text: str) -> Record | RecordOfKeys:
    """Read a record. Raises DamagedError that says why the text is none.

    Of an edit the first word alone is read: to show a model needs no more. See `Record.unreadable_edit` for the rest.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedError("it is not JSON") from None
    if not isinstance(document, dict) or "schema" not in document:
        raise DamagedError("modelcli did not write it: it has no schema")
    if type(document["schema"]) is not int or document["schema"] != SCHEMA:
        raise DamagedError(f"its schema is {document['schema']!r:.40}, and this version of modelcli reads {SCHEMA}")
    try:
        if "keys" in document:
            if document["reference"] is not None:
                raise ValueError("it names an architecture and lists none of its modules")
            return RecordOfKeys(_record(document, (), _ROOT), record_of_keys.from_json(document["keys"]))
        return _record(document, _texts(document["frozen"]), json_form.from_json(document["blueprint"]))
    except KeyError as error:
        raise DamagedError(f"it lacks {error}") from None
    except RequestError as error:
        raise DamagedError(_unreadable(error)) from None
    except (TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{error!s:.200}") from None


def _record(document: Mapping[str, Any], frozen: tuple[str, ...], blueprint: Blueprint) -> Record:
    """The record that a document is, with what it says of the model. Raises as `json_form.from_json` does."""
    edits = _texts(document["edits"])
    _require_known_edits(edits)
    seed = document["seed"]
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"its seed is {seed!r:.40}")
    return Record(
        reference=_optional_text(document["reference"]),
        weights=_optional_text(document["weights"]),
        seed=seed,
        edits=edits,
        frozen=frozen,
        blueprint=blueprint,
        input_size=_sizes(document.get("input_size")),
        input_dtype=_dtypes(document.get("input_dtype") or []),
        numbers=_numbers(document.get("numbers", [*range(1, len(edits) + 1)]), len(edits)),
        edit_count=_count(document.get("edit_count", len(edits))),
        inputs=_inputs(document.get("inputs")),
        configuration=_optional_text(document.get("configuration")),
    )


def _unreadable(error: RequestError) -> str:
    return f"a line in it cannot be read: {error.message:.200}"


def _require_known_edits(lines: tuple[str, ...]) -> None:
    """Raise RequestError for a line whose first word is not the name of an edit."""
    if not lines:
        return
    from modelcli.edits import registry

    known = frozenset(registry.own_names())
    for line in lines:
        if line.partition(" ")[0] not in known:
            from modelcli import edits

            edits.parse(line)  # of another package, or none: the error says which there are


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("a list of text was expected")
    return tuple(values)


def _inputs(values: object) -> tuple[str, ...]:
    texts = () if values is None else _texts(values)
    if texts:
        from modelcli.language import input_texts

        input_texts.parse_all(texts)
    return texts


def _dtypes(values: object) -> tuple[str, ...]:
    names = _texts(values)
    if wrong := [name for name in names if name not in INPUT_DTYPES]:
        raise ValueError(f"its input_dtype has no dtype {wrong[0]!r:.40}")
    return names


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
    return tuple(map(shape_from_json, value))


def disagreement(record: Record, tensors: Mapping[str, TensorInfo], *, known_code: bool) -> str | None:
    """Why a record cannot be believed, or None.

    Its blueprint must list the tensors that the file holds, as they are there, and must not contradict itself. With
    `known_code` it names classes of known libraries alone, so that a `Linear` in it is that of `torch.nn`.
    """
    if (why := _tensors_differ(record, tensors)) is not None:
        return why
    from modelcli.checkpoints import record_consistency

    blueprint = record.blueprint
    if (why := record_consistency.contradiction(blueprint, known_code=known_code)) is not None:
        return why
    listed = {t.name: t for t in blueprint.tensors if t.requires_grad is False and t.tied_to is None}
    if (odd := next((name for name in record.frozen if name not in listed), None)) is not None:
        return f"it names {odd} as frozen, but does not list it as a frozen parameter"
    frozen = set(record.frozen)
    odd = next((name for name, tensor in listed.items() if name not in frozen and _is_dense(tensor)), None)
    if odd is not None:
        return f"it lists the parameter {odd} as frozen, but does not name it as frozen"
    traced = blueprint.trace.inputs if blueprint.trace is not None else None
    if record.inputs and traced is not None:
        traced = traced[: len(record.input_size or ())]  # those that are stated by name come after these
    if record.input_size is not None and traced is not None and traced != record.input_size:
        return "its input is not the input of its forward pass"
    return None


def _is_dense(tensor: TensorInfo) -> bool:
    """Whether the record decides its flag: what is no dense tensor keeps its own."""
    return tensor.layout == "strided" and tensor.stored_bytes is None and tensor.is_differentiable


def _tensors_differ(record: Record, tensors: Mapping[str, TensorInfo]) -> str | None:
    """How the tensors of a file are not those that its record lists."""
    expected = {t.name: t for t in record.blueprint.tensors if t.persistent}
    if missing := expected.keys() - tensors.keys():
        return f"it lists {counted(len(missing), 'tensor')} that the file lacks, such as {min(missing)}"
    if extra := tensors.keys() - expected.keys():
        return f"it lacks {counted(len(extra), 'tensor')} of the file, such as {min(extra)}"
    for name, tensor in expected.items():
        found = tensors[name]
        if (tensor.shape, tensor.dtype) != (found.shape, found.dtype):
            return f"{name} is {list(found.shape or ())} {found.dtype} in the file, but not in the record"
        if (tensor.layout, tensor.stored_bytes) != (found.layout, found.stored_bytes):
            return f"{name} is stored in another way in the file"
        if found.requires_grad is not None and (tensor.kind != "parameter" or tensor.requires_grad is None):
            return f"{name} is a parameter in the file, but not in the record"
        if found.requires_grad is not None and tensor.requires_grad is not found.requires_grad:
            return f"{name} is {'trained' if found.requires_grad else 'frozen'} in the file, but not in the record"
        if tensor.tied_to is None or not tensor.elements:
            continue
        if tensor.tied_to not in tensors or tensors[tensor.tied_to].identity != found.identity:
            return f"{name} and {tensor.tied_to} are two tensors in the file, but tied in the record"
    return None
