"""Blueprints, models as plain data. The expected counts follow PyTorch's rules and are computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcli.model.blueprint import Blueprint, LayerTrace, ModuleInfo, Trace, depth_first, from_keys
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.json_form import from_json, to_json
from modelcli.model.paths import ancestors, parent_of, shown
from modelcli.model.printed import repr_text
from modelcli.model.tensors import TensorInfo
from modelcli.model.totals import Totals, totals_of

#: An embedding tied to its output layer, a frozen layer with a buffer, and a half-precision one.
TIED = Blueprint(
    modules=(
        ModuleInfo("", "Model", ("Model",)),
        ModuleInfo("embed", "Embedding", ("Embedding",), "11, 4"),
        ModuleInfo("norm", "BatchNorm1d", ("BatchNorm1d", "_BatchNorm", "_NormBase"), "4"),
        ModuleInfo("body", "Sequential", ("Sequential",)),
        ModuleInfo("body.0", "Linear", ("Linear",), "in_features=4, out_features=2, bias=True"),
        ModuleInfo("body.1", "ReLU", ("ReLU",)),
        ModuleInfo("head", "Linear", ("Linear",), "in_features=4, out_features=11, bias=False"),
    ),
    tensors=(
        TensorInfo("embed.weight", (11, 4), "float32", requires_grad=True),
        TensorInfo("norm.weight", (4,), "float32", requires_grad=False),
        TensorInfo("norm.bias", (4,), "float32", requires_grad=False),
        TensorInfo("norm.running_mean", (4,), "float32", "buffer"),
        TensorInfo("norm.num_batches_tracked", (), "int64", "buffer"),
        TensorInfo("body.0.weight", (2, 4), "float16", requires_grad=True),
        TensorInfo("body.0.bias", (2,), "float16", requires_grad=False),
        TensorInfo("head.weight", (11, 4), "float32", requires_grad=True, tied_to="embed.weight"),
    ),
)


def test_paths() -> None:
    assert shown("") == "."
    assert shown("a.b") == "a.b"
    assert parent_of("a.b.c") == "a.b"
    assert parent_of("a") == ""
    assert list(ancestors("a.b.c")) == ["a.b.c", "a.b", "a", ""]
    assert list(ancestors("")) == [""]
    assert [module.depth for module in TIED.modules] == [0, 1, 1, 1, 2, 2, 1]


def test_tensors_count_their_elements_and_bytes() -> None:
    assert TensorInfo("a", (2, 3), "float16").nbytes == 12
    assert TensorInfo("a", (), "int64").elements == 1  # a scalar
    assert TensorInfo("a", (0, 3), "float32").nbytes == 0
    assert TensorInfo("a", None, "float32").elements == 0  # lazy: no shape yet
    assert {name: ITEM_BYTES[name] for name in ("bool", "bfloat16", "float32", "complex128")} == {
        "bool": 1,
        "bfloat16": 2,
        "float32": 4,
        "complex128": 16,
    }


def test_totals_count_a_tied_tensor_once() -> None:
    totals = TIED.totals
    assert totals.params == 44 + 4 + 4 + 8 + 2
    assert totals.trainable_params == 44 + 8
    assert totals.non_trainable_params == 10
    assert totals.buffers == 4 + 1
    assert totals.param_bytes == (44 + 8) * 4 + 10 * 2
    assert totals.buffer_bytes == 4 * 4 + 8


def test_unstated_trainability_is_unknown() -> None:
    assert totals_of([TensorInfo("w", (3,), "float32")]) == Totals(3, None, 0, 12, 0)


def test_parameters_of_a_module_are_those_of_its_whole_subtree() -> None:
    assert {module.path: TIED.params_of(module.path) for module in TIED.modules} == {
        "": 62,
        "embed": 44,
        "norm": 8,
        "body": 10,
        "body.0": 10,
        "body.1": 0,
        "head": 44,
    }
    shared = replace(TIED, modules=TIED.modules[:1], tensors=(TIED.tensors[0], TIED.tensors[-1]))
    assert shared.params_of("") == 44


def test_trainable_is_true_false_partial_or_none() -> None:
    assert {module.path: TIED.trainable_of(module.path) for module in TIED.modules} == {
        "": "partial",
        "embed": True,
        "norm": False,
        "body": "partial",
        "body.0": "partial",
        "body.1": None,
        "head": True,
    }


def test_lookups() -> None:
    assert TIED.root.type == "Model"
    assert TIED.by_path["body.0"].config == "in_features=4, out_features=2, bias=True"
    assert TIED.by_name["norm.bias"].shape == (4,)
    assert [child.path for child in TIED.children["body"]] == ["body.0", "body.1"]
    assert [child.path for child in TIED.children[""]] == ["embed", "norm", "body", "head"]
    assert TIED.by_path["body"].is_sequence
    assert not TIED.by_path["norm"].is_sequence


def test_a_bare_checkpoint_is_a_tree_of_its_keys() -> None:
    bare = from_keys(TensorInfo(name, (1,), "float32") for name in ("b.0.w", "a.w", "b.1.x.w", "b.0.v", "top"))
    assert [module.path for module in bare.modules] == ["", "b", "b.0", "b.1", "b.1.x", "a"]
    assert {module.type for module in bare.modules} == {None}
    assert [tensor.name for tensor in bare.tensors] == ["b.0.w", "a.w", "b.1.x.w", "b.0.v", "top"]
    assert [module.path for module in from_keys([]).modules] == [""]
    typed = from_keys([TensorInfo("a.w", (1,), "float32")], {"": "Net", "b.act": "ReLU"})
    assert [(module.path, module.type) for module in typed.modules] == [
        ("", "Net"),
        ("b", None),  # a module whose class the file does not name still has its children
        ("b.act", "ReLU"),
        ("a", None),
    ]


# --- as print(model) shows it --------------------------------------------------------------------------------------


def test_the_text_of_a_model_is_that_of_print() -> None:
    assert repr_text(TIED) == (
        "Model(\n"
        "  (embed): Embedding(11, 4)\n"
        "  (norm): BatchNorm1d(4)\n"
        "  (body): Sequential(\n"
        "    (0): Linear(in_features=4, out_features=2, bias=True)\n"
        "    (1): ReLU()\n"
        "  )\n"
        "  (head): Linear(in_features=4, out_features=11, bias=False)\n"
        ")"
    )
    assert repr_text(TIED, "body.1") == "ReLU()"


def test_a_module_list_folds_runs_of_equal_children() -> None:
    kinds = ["ReLU", "ReLU", "ReLU", "Tanh", "ReLU"]
    model = Blueprint(
        (
            ModuleInfo("", "ModuleList", ("ModuleList",)),
            *(ModuleInfo(str(number), kind, (kind,)) for number, kind in enumerate(kinds)),
        ),
        (),
    )
    assert repr_text(model) == "ModuleList(\n  (0-2): 3 x ReLU()\n  (3): Tanh()\n  (4): ReLU()\n)"
    assert repr_text(replace(model, modules=model.modules[:1])) == "ModuleList()"


def test_a_class_that_prints_itself_in_its_own_way_does() -> None:
    model = Blueprint((ModuleInfo("", "Net", ("Net",)), ModuleInfo("a", "Own", ("Own",), own_repr="Own<\n  3>")), ())
    assert repr_text(model) == "Net(\n  (a): Own<\n    3>\n)"


def test_a_configuration_of_several_lines_stands_before_the_children() -> None:
    model = Blueprint((ModuleInfo("", "Net", ("Net",), "a=1\nb=2"), ModuleInfo("c", "ReLU", ("ReLU",))), ())
    assert repr_text(model) == "Net(\n  a=1\n  b=2\n  (c): ReLU()\n)"


def test_a_child_that_is_none_is_printed() -> None:
    model = Blueprint((ModuleInfo("", "Net", ("Net",), absent=((1, "b"),)), ModuleInfo("a", "ReLU", ("ReLU",))), ())
    assert repr_text(model) == "Net(\n  (a): ReLU()\n  (b): None\n)"


# --- to JSON and back ----------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
sizes = st.integers(0, 2**40)
shapes = st.lists(sizes, max_size=4).map(tuple)
tensor_infos = st.builds(
    TensorInfo,
    texts,
    st.none() | shapes,
    st.sampled_from(sorted(ITEM_BYTES)),
    st.sampled_from(["parameter", "buffer"]),
    st.sampled_from([None, True, False]),
    st.none() | texts,
    st.booleans(),
    st.sampled_from(["strided", "sparse_coo", "sparse_csr"]),
    st.none() | sizes,
)
absents = st.lists(st.tuples(st.integers(0, 9), texts), max_size=2).map(tuple)
module_infos = st.builds(
    ModuleInfo,
    texts,
    st.none() | texts,
    st.lists(texts, max_size=3).map(tuple),
    texts,
    st.none() | texts,
    st.none() | texts.filter(bool),
    absents,
).map(lambda info: replace(info, shared_with=info.shared_with or None))
output_shapes = st.recursive(
    st.none() | st.lists(sizes, max_size=4),
    lambda below: st.lists(below, min_size=1, max_size=3) | st.dictionaries(texts, below, max_size=3),
    max_leaves=5,
).filter(lambda value: value is not None)
traces = st.builds(
    Trace,
    st.none() | st.lists(shapes, max_size=2).map(tuple),
    st.dictionaries(texts, st.builds(LayerTrace, st.none() | output_shapes, sizes), max_size=3),
    st.none() | sizes,
    st.none() | sizes,
    st.none() | sizes,
    st.none() | texts,
)
blueprints = st.builds(
    Blueprint,
    st.builds(
        lambda root, rest: (replace(root, path=""), *(module for module in rest if module.path)),
        module_infos,
        st.lists(module_infos, max_size=4, unique_by=lambda module: module.path),
    ),
    st.lists(tensor_infos, max_size=5, unique_by=lambda tensor: tensor.name).map(tuple),
    st.none() | traces,
)


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=4).map(".".join), max_size=8))
@settings(deadline=None)
def test_modules_are_in_the_order_of_a_walk(paths: list[str]) -> None:
    """The order is that of `named_modules()` for nested ModuleDicts that are filled in this order."""
    tree: dict[str, Any] = {}
    paid: list[int] = []
    for path in filter(None, paths):
        inner = tree
        for part in path.split("."):
            inner = inner.setdefault(part, {})

    def walk(inner: dict[str, Any], path: str) -> list[str]:
        return [path, *(found for name in inner for found in walk(inner[name], f"{path}.{name}" if path else name))]

    wanted = walk(tree, "")
    assert depth_first(paths, paid.append) == wanted
    assert sorted(paid) == sorted(map(len, wanted[1:]))


@given(blueprints)
@settings(deadline=None)
def test_json_gives_the_blueprint_back(blueprint: Blueprint) -> None:
    assert from_json(json.loads(json.dumps(to_json(blueprint)))) == blueprint


def test_json_contains_only_values_that_are_set() -> None:
    document = to_json(TIED)
    assert document["tensors"][0] == {
        "name": "embed.weight",
        "shape": [11, 4],
        "dtype": "float32",
        "requires_grad": True,
    }
    assert document["tensors"][4] == {
        "name": "norm.num_batches_tracked",
        "shape": [],
        "dtype": "int64",
        "kind": "buffer",
    }
    assert document["tensors"][7]["tied_to"] == "embed.weight"
    assert document["modules"][5] == {"path": "body.1", "class": 5}
    assert document["classes"][5] == {"type": "ReLU", "bases": ["ReLU"]}
    assert document["modules"][4]["class"] == document["modules"][6]["class"]  # two Linear, one class
    assert "trace" not in document


PLACES: list[tuple[list[Any], list[Any]]] = [
    (["modules"], [None, 3, [], [{"path": "a", "class": 0}]]),
    (["modules", 1, "path"], [None, 3, ["a"]]),
    (["modules", 1, "class"], [None, 99, "0", 0.5]),
    (["modules", 1, "config"], [None, 3, ["a"]]),
    (["modules", 1, "shared_with"], [3, ["a"]]),
    (["modules", 1, "own_repr"], [3, ["a"]]),
    (["modules", 1, "absent"], [3, [1], [[1]], [["a", "b"]], [[1, 2]], [[-1, "b"]], [[float("inf"), "b"]]]),
    (["classes", 0, "type"], [3, ["a"]]),
    (["classes", 0, "bases"], [None, 3, [3]]),
    (["tensors"], [None, 3, [3], "ab"]),
    (["tensors", 0, "name"], [None, 3]),
    (["tensors", 0, "shape"], [3, "12", ["1"], [-1], [1.5], [True], [2**63], [float("inf")], {"a": 1}]),
    (["tensors", 0, "dtype"], [None, "float31", ["float32"], {}]),
    (["tensors", 0, "kind"], [None, "weight", 1, ["parameter"]]),
    (["tensors", 0, "requires_grad"], ["yes", 1, 0, []]),
    (["tensors", 0, "tied_to"], [3, ["a"]]),
    (["tensors", 0, "persistent"], [None, "no", 1]),
    (["tensors", 0, "layout"], [None, 3, ["strided"]]),
    (["tensors", 0, "stored_bytes"], ["1", -1, 1.5]),
    (["trace"], [3, "ab", [1]]),
    (["trace", "inputs"], [3, "12", [["1"]], [[-1]]]),
    (["trace", "layers"], [None, 3, [3], [["", []]], [[3, [], 0]], [["", 5, 0]], [["", "ab", 0]], [["", [1, "a"], 0]]]),
    (["trace", "layers", 0, 2], ["1", -1, 1.5]),  # None is for another path of a shared module
    (["trace", "device"], ["cuda", 3, ["cpu"]]),
    (["trace", "notes"], [3, [3]]),
    (["trace", "uncounted"], [3, [3]]),
    (["trace", "macs"], ["1", -1, [1]]),
    (["trace", "reason"], [3, ["a"]]),
]


@pytest.mark.parametrize(("place", "value"), [(place, value) for place, values in PLACES for value in values])
def test_json_of_any_other_form_is_refused(place: list[Any], value: object) -> None:
    """A blueprint can come from a file, and a value of a wrong type would fail much later."""
    whole = TIED.with_trace(Trace(((1, 4),), {"": LayerTrace([1, 4], 7)}, 7, 16, 16))
    document = json.loads(json.dumps(to_json(whole)))
    assert from_json(document) == whole
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises((KeyError, TypeError, ValueError, IndexError)):
        from_json(document)


@pytest.mark.parametrize("document", [{}, [], None, "text", 3, {"classes": []}, {"classes": [], "modules": []}])
def test_json_that_is_not_a_blueprint_is_refused(document: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, IndexError)):
        from_json(document)
