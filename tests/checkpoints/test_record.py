"""The record in a written checkpoint (section 7 of the contract), which is untrusted input."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcli import edits
from modelcli.checkpoints.record import Record, disagreement, from_text, to_text
from modelcli.model.blueprint import from_keys
from modelcli.model.dtypes import INPUT_DTYPES
from modelcli.model.tensors import TensorInfo
from tests.model.test_blueprints import TIED, blueprints, sizes, texts

RECORD = Record(
    reference="alexnet",
    weights="IMAGENET1K_V1",
    seed=7,
    edits=("replace head Linear(4,11,bias=False)", "freeze norm"),
    frozen=("norm.weight", "norm.bias", "body.0.bias"),
    blueprint=TIED,
    input_size=((1, 3), (2,)),
    input_dtype=("int64", "float32"),
    numbers=(1, 3),
    edit_count=4,
)
records = st.builds(
    Record,
    st.none() | texts,
    st.none() | texts,
    st.integers(0, 2**63 - 1),
    st.lists(st.sampled_from(RECORD.edits), max_size=3).map(tuple),
    st.lists(texts, max_size=3).map(tuple),
    blueprints,
    st.none() | st.lists(st.lists(sizes, max_size=3).map(tuple), max_size=2).map(tuple),
    st.lists(st.sampled_from(sorted(INPUT_DTYPES)), max_size=2).map(tuple),
).map(lambda record: replace(record, numbers=tuple(range(3, 3 + len(record.edits))), edit_count=9))


@given(records)
@settings(deadline=None)
def test_a_record_survives_writing_and_reading(record: Record) -> None:
    assert from_text(to_text(record)) == record
    assert to_text(record).isascii()
    assert to_text(replace(record)) == to_text(record)


def test_the_contents_of_a_record() -> None:
    document = json.loads(to_text(RECORD))
    assert document["schema"] == 1
    assert document["reference"] == "alexnet"
    assert document["weights"] == "IMAGENET1K_V1"
    assert document["seed"] == 7
    assert document["edits"] == ["replace head Linear(4,11,bias=False)", "freeze norm"]
    assert (document["numbers"], document["edit_count"]) == ([1, 3], 4)
    assert document["frozen"] == ["norm.weight", "norm.bias", "body.0.bias"]
    assert document["input_size"] == [[1, 3], [2]]
    assert [tensor["name"] for tensor in document["blueprint"]["tensors"]] == [info.name for info in TIED.tensors]


def test_the_edits_of_a_record_are_parsed() -> None:
    assert RECORD.parsed_edits() == [edits.parse(line) for line in RECORD.edits]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("schema", [2, 0, None, "1"]),
        ("reference", [3, ["alexnet"]]),
        ("weights", [3, {}]),
        ("seed", [-1, 2**63, "0", 0.5, True, None]),
        ("edits", [None, "freeze norm", [3], ["frezee norm"], ["freeze a{"], ["replace a " + "(" * 9999]]),
        ("frozen", [None, "norm", [3]]),
        ("input_size", [3, "1,3", [3], ["13"], [[-1]], [[1.5]], [[float("inf")]], [["1"]]]),
        ("input_dtype", ["int64", [3], ["nonsense"], ["quint8"]]),
        ("blueprint", [None, [], {}, 3]),
    ],
)
def test_a_record_of_another_form_is_ignored(key: str, values: list[Any]) -> None:
    for value in values:
        document = json.loads(to_text(RECORD))
        document[key] = value
        assert from_text(json.dumps(document)) is None, value


@pytest.mark.parametrize("key", ["schema", "reference", "weights", "seed", "edits", "frozen", "blueprint"])
def test_a_record_without_a_required_key_is_ignored(key: str) -> None:
    document = json.loads(to_text(RECORD))
    del document[key]
    assert from_text(json.dumps(document)) is None


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", "[" * 100_000, '{"schema":1}', "9" * 5000, to_text(RECORD)[:-1]]
)
def test_a_damaged_record_text_is_ignored(text: str) -> None:
    assert from_text(text) is None


def test_unknown_keys_of_later_versions_are_ignored() -> None:
    document = json.loads(to_text(RECORD)) | {"more": 1}
    assert from_text(json.dumps(document)) == RECORD


@given(st.text(max_size=50))
@settings(deadline=None)
def test_no_record_text_raises(text: str) -> None:
    assert from_text(text) is None


# --- a record is used only if it agrees with the file --------------------------------------------------------------


def in_file(**changed: TensorInfo | None) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo | None] = {info.name: info for info in TIED.tensors}
    found |= {name.replace("__", "."): info for name, info in changed.items()}
    return {name: info for name, info in found.items() if info is not None}


def test_a_record_that_matches_the_tensors_is_used() -> None:
    assert disagreement(RECORD, in_file(), known_code=True) is None
    # the record adds what a file cannot store
    bare = {name: TensorInfo(name, info.shape, info.dtype, tied_to=info.tied_to) for name, info in in_file().items()}
    assert disagreement(RECORD, bare, known_code=True) is None


def test_non_persistent_buffers_need_not_be_in_the_file() -> None:
    own = TensorInfo("positions", (4,), "float32", "buffer", persistent=False)
    record = replace(RECORD, blueprint=replace(TIED, tensors=(*TIED.tensors, own)))
    assert disagreement(record, in_file(), known_code=True) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"norm__bias": None}, "it lists 1 tensor that the file lacks, such as norm.bias"),
        ({"extra": TensorInfo("extra", (1,), "float32")}, "it lacks 1 tensor of the file, such as extra"),
        ({"norm__bias": TensorInfo("norm.bias", (5,), "float32")}, "norm.bias is [5] float32 in the file"),
        ({"norm__bias": TensorInfo("norm.bias", (4,), "float64")}, "norm.bias is [4] float64 in the file"),
    ],
)
def test_a_record_of_other_tensors_is_rejected(changed: dict[str, TensorInfo | None], words: str) -> None:
    assert words in (disagreement(RECORD, in_file(**changed), known_code=True) or "")


def test_a_record_of_a_state_dict_model() -> None:
    record = Record(None, None, 0, (), (), from_keys([TensorInfo("a.w", (1,), "float32")]))
    assert from_text(to_text(record)) == record
