"""`diff` agrees with plain PyTorch on the results of every kind of edit, and reads only what it must."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import textwrap
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from modelcli.checkpoints import Span, byte_comparison
from modelcli.commands import diff
from modelcli.language.references import Source
from tests.checkpoints import test_distributed
from tests.conftest import Cli
from tests.needs import needs_torch
from tests.render.test_golden import Terminal
from tests.values.test_statistics import sparse_file

State = dict[str, torch.Tensor]
BASE = "Sequential(Conv2d(1,4,1),BatchNorm2d(4),Flatten(),Linear(4,3),Linear(3,2))"


def plain(before: State, after: State, atol: float = 0.0) -> dict[str, dict[str, Any]]:
    """Compare two state dicts with plain torch. Returns the changes of each name, with the largest difference."""
    found: dict[str, dict[str, Any]] = {}
    for name in {**before, **after}:
        changes: dict[str, Any] = {}
        if name not in before or name not in after:
            changes["added" if name not in before else "removed"] = None
        else:
            one, other = before[name], after[name]
            if one.shape != other.shape:
                changes["shape"] = [list(one.shape), list(other.shape)]
            elif not torch.equal(wide(one).nan_to_num(123), wide(other).nan_to_num(123)):
                largest = (wide(one) - wide(other)).abs().max().item()
                if largest > atol:
                    changes["values"] = largest
            if one.dtype != other.dtype:
                changes["dtype"] = [str(one.dtype)[6:], str(other.dtype)[6:]]
        if changes:
            found[name] = changes
    return found


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64)


def shown(document: Any) -> dict[str, dict[str, Any]]:
    """Return the tensors of a JSON document in the form of `plain`, without requires_grad."""
    found: dict[str, dict[str, Any]] = {}
    for row in document["tensors"]:
        if row["change"] == "trainable":
            continue
        number = row["max_abs_diff"]
        pair = [row["before"], row["after"]] if row["change"] in ("shape", "dtype") else number
        found.setdefault(row["name"], {})[row["change"]] = pair
    return found


def states(*paths: str) -> list[State]:
    return [torch.load(path, weights_only=True) for path in paths]


# --- what differs --------------------------------------------------------------------------------------------------


EDITS = {
    # on a model, and on the keys of a file that records no architecture
    "replace 4 Linear(_,5)": "replace 4 Linear(_,5)",
    "replace 3 Linear(4,3) --keep-weights": "replace 3 Linear(4,3) --keep-weights",
    "add extra Linear(2,2)": "add extra Linear(2,2)",
    "insert 4 Linear(3,3)": "insert 4 Linear(3,3) --renumber",
    "append . Linear(2,7)": "add 5 Linear(2,7)",
    "remove 4": "remove 4 --renumber",
    "extract 0": "extract 0",
    "freeze 0": "rename 3.weight 3.kernel",
    "unfreeze 0": "rename 0.bias 0.shift",
    "init 3 xavier_uniform": "init 3 xavier_uniform",
    "cast 3 bfloat16": "cast 3 bfloat16",
    "cast . float16": "cast . float16",
    "resize 3 vocab_size=7": "rename 3.bias 3.shift",
    "tie 0.bias 1.bias": "tie 0.bias 1.bias",
    "tie 0.bias 1.bias; untie 1.bias": "tie 0.bias 1.bias; untie 1.bias",
    "set 1 momentum=0.5": "rename 3.bias 3.drift",
    "slice . 0-1,1": "slice . 0-1,1",
    "freeze 3": "split 3.weight 3.q 3.k 3.v",
    "freeze 4": "concat 1.weight 1.bias 1.both",
    "wrap 3 Sequential(_,PReLU())": "wrap 3 Sequential(_,PReLU())",
    "freeze 1": "unstack 4.weight 4.rows.*",
    "unfreeze 1": "unstack 4.weight 4.rows.*; stack 4.rows.* 4.weight --dim 1",
    "unfreeze 3": "permute 3.weight 1,0",
    "unfreeze 4": "reshape 4.weight 3,-1",
    "fuse 1 --into 0": "unfreeze 0",
    "cast 3.bias float64": "cast 3.weight float8_e4m3fn; rename 3.bias 3.weight_scale; dequantize 3 bfloat16",
    "graft 3 Linear(4,3)": "graft 3 Linear(4,3)",
}


@pytest.mark.parametrize("of_keys", [False, True], ids=["model", "keys"])
@pytest.mark.parametrize("line", list(EDITS))
def test_what_every_edit_changes_is_what_plain_torch_finds(cli: Cli, line: str, of_keys: bool) -> None:
    cli("save", "a.pth", "-m", BASE)
    if of_keys:
        torch.save(dict(torch.load("a.pth", weights_only=True)), "a.pth")
        line = EDITS[line]
    edits = [word for part in line.split("; ") for word in ("-e", part)]
    cli("apply", "-m", "a.pth", "-o", "b.pth", *edits, "--check", "none")
    for one, other in (("a.pth", "b.pth"), ("b.pth", "a.pth")):
        document = cli("diff", one, other, "--json", code=cli_code(one, other)).json
        assert shown(document) == plain(*states(one, other))
        assert document.keys() >= {"schema", "a", "b", "same", "modules", "tensors"}
        assert (document["a"], document["b"]) == (one, other)
        assert document["same"] == (not (document["tensors"] or document["modules"]))


def cli_code(one: str, other: str) -> int:
    """Return 1 if plain torch finds a difference, or the records frozen parameters or settings that differ; else 0."""
    import modelcli

    before, after = (modelcli.blueprint(path) for path in (one, other))
    flags = [{t.name: t.requires_grad for t in found.tensors} for found in (before, after)]
    frozen = any(flags[1].get(name, flag) not in (flag, None) for name, flag in flags[0].items() if flag is not None)
    settings = [{m.path: m.config for m in found.modules if m.type is not None} for found in (before, after)]
    set_anew = any(settings[1].get(path, config) != config for path, config in settings[0].items())
    return 1 if plain(*states(one, other)) or frozen or set_anew else 0


def test_modules_are_compared_where_both_sides_know_them(cli: Cli) -> None:
    cli("save", "a.pth", "-m", BASE)
    cli(
        "apply",
        "-m",
        "a.pth",
        "-o",
        "b.pth",
        "-e",
        "replace 4 Linear(_,5)",
        "-e",
        "replace 2 Identity",
        "-e",
        "add n ReLU",
    )
    rows = cli("diff", "a.pth", "b.pth", "--json", code=1).json["modules"]
    assert rows == [
        {"path": "2", "change": "type", "before": "Flatten(start_dim=1, end_dim=-1)", "after": "Identity"},
        {
            "path": "4",
            "change": "config",
            "before": "Linear(in_features=3, out_features=2, bias=True)",
            "after": "Linear(in_features=3, out_features=5, bias=True)",
        },
        {"path": "n", "change": "added", "before": None, "after": "ReLU"},
    ]
    assert cli("diff", "b.pth", "a.pth", "--json", code=1).json["modules"][-1]["change"] == "removed"
    torch.save(dict(torch.load("b.pth", weights_only=True)), "bare.pth")
    result = cli("diff", "a.pth", "bare.pth", code=1)
    assert (
        "bare.pth records no architecture, so modules were not compared, only tensors: pass --arch REFERENCE"
        in result.err
    )
    assert cli("diff", "a.pth", "bare.pth", "--json", code=1).json["modules"] == []


def test_flags(cli: Cli) -> None:
    cli("save", "a.pth", "-m", BASE)
    cli("freeze", "0", "-m", "a.pth", "-o", "b.pth")
    rows = cli("diff", "a.pth", "b.pth", "--json", code=1).json["tensors"]
    assert [(row["name"], row["change"], row["before"], row["after"]) for row in rows] == [
        ("0.weight", "trainable", True, False),
        ("0.bias", "trainable", True, False),
    ]
    torch.save(dict(torch.load("b.pth", weights_only=True)), "bare.pth")  # does not store requires_grad
    assert "are the same" in cli("diff", "a.pth", "bare.pth").out


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "shards", "distributed", "old"])
def test_the_same_in_every_format(cli: Cli, folder: Path, suffix: str) -> None:
    state = {"w": torch.randn(3, 5), "half": torch.randn(7).bfloat16(), "n": torch.arange(4), "s": torch.tensor(2.5)}
    torch.save(state, "a.pth")
    other = "b.pth"
    changed = {**state, "w": state["w"].clone()}
    for differs in (False, True):
        if differs:
            changed["w"][1, 2] += 1
        if suffix == "safetensors":
            other = "b.safetensors"
            save_file(changed, other)
        elif suffix == "shards":
            save_file(changed, f"c{differs}.safetensors")
            other = f"shards{differs}/"
            cli("save", other, "-m", f"c{differs}.safetensors")
        elif suffix == "distributed":
            other = f"ck{differs}"
            test_distributed.saved(changed, folder / other)
            other += "/"
        else:
            torch.save(changed, other, _use_new_zipfile_serialization=suffix == "pth")
        document = cli("diff", "a.pth", other, "--json", code=int(differs)).json
        assert shown(document) == (
            {"w": {"values": (wide(changed["w"]) - wide(state["w"])).abs().max().item()}} if differs else {}
        )


SPECIAL = {
    "a zero's sign": (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), None),
    "NaN on both sides": (torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 2.0]), 1.0),
    "other NaNs": (
        torch.tensor([0x7FC00000, 0], dtype=torch.int32).view(torch.float32),
        torch.tensor([0x7FC00001, 0], dtype=torch.int32).view(torch.float32),
        None,
    ),
    "NaN on one side": (torch.tensor([5.0, 1.0]), torch.tensor([math.nan, 2.0]), "NaN"),
    "infinities": (torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.5]), 0.5),
    "opposite infinities": (torch.tensor([math.inf]), torch.tensor([-math.inf]), "Infinity"),
    "complex": (torch.tensor([3 + 4j]), torch.tensor([0j]), 5.0),
    "truth": (torch.tensor([True, False]), torch.tensor([True, True]), 1),
    "beyond 2^53": (torch.tensor([2**60]), torch.tensor([2**60 + 1]), 1),
    "beyond int64": (torch.tensor([-(2**63), 0]), torch.tensor([2**63 - 1, 0]), 2**64 - 1),
    "uint64": (
        torch.tensor([-1, 0]).view(torch.uint64),
        torch.tensor([0, 0]).view(torch.uint64),
        2**64 - 1,
    ),
    "uint8": (torch.tensor([255], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8), 255),
    "float8": (torch.tensor([1.0]).to(torch.float8_e4m3fn), torch.tensor([2.0]).to(torch.float8_e4m3fn), 1.0),
    "float8 against NaN": (
        torch.tensor([1.0, math.nan]).to(torch.float8_e5m2),
        torch.tensor([1.5, math.nan]).to(torch.float8_e5m2),
        0.5,
    ),
    "half": (torch.tensor([1.0, math.inf]).half(), torch.tensor([1.25, math.inf]).half(), 0.25),
    "complex NaN": (torch.tensor([complex(math.nan, 1), 0j]), torch.tensor([complex(math.nan, 2), 2j]), "NaN"),
    "scalars": (torch.tensor(1.0), torch.tensor(3.0), 2.0),
    "empty": (torch.empty(0, 3), torch.empty(0, 3), None),
}


@pytest.mark.parametrize("what", list(SPECIAL))
def test_the_largest_difference_of_each_dtype(cli: Cli, what: str) -> None:
    assert_largest_difference(cli, *SPECIAL[what])


@needs_torch("float4_e2m1fn_x2")
def test_a_dtype_that_torch_cannot_compute_with(cli: Cli) -> None:
    one, other = (torch.tensor([byte], dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for byte in (1, 2))
    assert_largest_difference(cli, one, other, "unknown")


def assert_largest_difference(cli: Cli, before: torch.Tensor, after: torch.Tensor, wanted: Any) -> None:
    torch.save({"t": before}, "a.pth")
    torch.save({"t": after}, "b.pth")
    rows = cli("diff", "a.pth", "b.pth", "--json", code=0 if wanted is None else 1).json["tensors"]
    assert [row["max_abs_diff"] for row in rows] == (
        [] if wanted is None else [None if wanted == "unknown" else wanted]
    )
    assert cli("diff", "a.pth", "a.pth").out == "a.pth and a.pth are the same: 1 tensor is equal\n"


def test_a_changed_dtype_and_changed_values_are_both_reported(cli: Cli) -> None:
    whole = torch.arange(4.0)
    torch.save({"exact": whole, "rounded": torch.tensor([0.1]), "n": torch.arange(3)}, "a.pth")
    torch.save({"exact": whole.half(), "rounded": torch.tensor([0.1]).half(), "n": torch.arange(3).int()}, "b.pth")
    document = cli("diff", "a.pth", "b.pth", "--json", code=1).json
    assert shown(document) == plain(*states("a.pth", "b.pth"))
    assert [(row["name"], row["change"]) for row in document["tensors"]] == [
        ("exact", "dtype"),
        ("rounded", "dtype"),
        ("rounded", "values"),
        ("n", "dtype"),
    ]


@pytest.mark.filterwarnings("ignore:torch.quantize_per")
@pytest.mark.filterwarnings("ignore:Sparse")
def test_quantized_and_sparse_tensors_by_their_parts(cli: Cli) -> None:
    numbers = torch.tensor([[0.0, 1.0], [2.0, 0.0]])

    def made(scale: float, more: float) -> dict[str, Any]:
        return {
            "q": torch.quantize_per_tensor(numbers, scale, 0, torch.qint8),
            "c": torch.quantize_per_channel(
                numbers + more, torch.tensor([0.5, 0.5]), torch.tensor([0, 0]), 0, torch.qint8
            ),
            "s": (numbers * (1 + more)).to_sparse(),
        }

    torch.save(made(0.5, 0), "a.pth")
    torch.save(made(0.5, 0), "b.pth")
    torch.save(made(0.25, 0), "c.pth")
    torch.save(made(0.5, 1), "d.pth")
    assert "are the same" in cli("diff", "a.pth", "b.pth").out
    for other, wanted in (("c.pth", ["q"]), ("d.pth", ["c", "s"])):
        rows = cli("diff", "a.pth", other, "--json", code=1).json["tensors"]
        assert [(row["name"], row["change"], row["max_abs_diff"]) for row in rows] == [
            (n, "values", None) for n in wanted
        ]
    torch.save({"s": numbers}, "e.pth")
    rows = cli("diff", "a.pth", "e.pth", "-s", "s", "--json", code=1).json["tensors"]
    assert [(row["change"], row["before"], row["after"]) for row in rows] == [("layout", "sparse_coo", "strided")]


MADE_OF_PARTS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, number=1.0):
        super().__init__()
        self.register_buffer("mask", (number * torch.eye(3, device="cpu")).to_sparse())
        codes = torch.ones(2, 3, dtype=torch.int8, device="cpu")
        scales, zeros = torch.tensor([1.0, number], device="cpu"), torch.tensor([0, 0], device="cpu")
        self.register_buffer("codes", torch._make_per_tensor_quantized_tensor(codes, number, 0))
        self.register_buffer("rows", torch._make_per_channel_quantized_tensor(codes, scales, zeros, 0))
"""


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_sparse_tensors_of_classes_by_their_parts(cli: Cli) -> None:
    Path("own.py").write_text(MADE_OF_PARTS)
    cli("save", "own.pth", "-m", "own.py:Net")
    torch.save(dict(torch.load("own.pth", weights_only=True)), "bare.pth")
    names = ["mask", "codes", "rows"]
    for one in ("own.py:Net", "bare.pth", "own.pth"):
        assert "are the same: 3 tensors are equal" in cli("diff", one, "own.py:Net()").out
        cli("check", one, "--same-as", "own.py:Net()")
        rows = cli("diff", one, "own.py:Net(2.0)", "--json", code=1).json["tensors"]
        assert [(row["name"], row["change"]) for row in rows] == [(name, "values") for name in names]
        cli("check", "own.py:Net(2.0)", "--same-as", one, code=1)


def test_comparing_nothing_does_not_count_as_equal(cli: Cli) -> None:
    cli("save", "a.pth", "-m", BASE)
    result = cli("diff", "a.pth", BASE, "-s", "4.bias", "--except", "4.bias", code=2)
    told = "nothing is left to compare: --except 4.bias leaves out all that -s 4.bias picks"
    assert f"{told}\n" in result.err
    everything = "nothing is left to compare: --except . leaves out everything"
    assert everything in cli("diff", "a.pth", BASE, "--except", ".", code=2).err
    assert everything in cli("check", "a.pth", "--same-as", BASE, "--except", ".", code=2).err
    # A module without tensors is compared only if both sides know its class.
    cli("diff", "a.pth", BASE, "-s", "2")
    torch.save({"4.weight": torch.ones(2)}, "bare.pth")
    assert "-s 1 picks no tensor" in cli("diff", "Sequential(ReLU(),ReLU())", "bare.pth", "-s", "1", code=2).err
    assert "are the same" in cli("diff", "ReLU()", "ReLU()").out
    cli("check", "ReLU()", "--same-as", "ReLU()")


def test_tensors_that_were_not_compared_do_not_count_as_equal(cli: Cli) -> None:
    torch.save({"w": torch.ones(2), "a": torch.ones(2)}, "a.pth")
    torch.save({"w": torch.ones(2, device="meta"), "a": torch.ones(2)}, "b.pth")
    for pair in (("a.pth", "b.pth"), ("b.pth", "a.pth")):
        result = cli("diff", *pair, "--json", code=1)
        assert [(row["name"], row["change"]) for row in result.json["tensors"]] == [("w", "not compared")]
        assert "the values of w were not compared" in result.json["notes"][0]
        row = cli("check", pair[0], "--same-as", pair[1], "--json", code=1).json["checks"][0]
        assert row["found"] == "1 tensor differs: w (not compared)"
    assert "are the same" in cli("diff", "LazyLinear(2)", "LazyLinear(2)").out


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_views_are_compared_by_what_they_show(cli: Cli, data: st.DataObject) -> None:
    def view() -> torch.Tensor:
        base = torch.randint(
            0, 3, (6, 6), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2)))
        ).float()
        found = base[:: data.draw(st.sampled_from([1, 2]))][:3, : data.draw(st.just(3))]
        return found.t() if data.draw(st.booleans()) else found.contiguous() if data.draw(st.booleans()) else found

    torch.save({"v": view()}, "a.pth")
    torch.save({"v": view()}, "b.pth")
    wanted = plain(*states("a.pth", "b.pth"))
    assert shown(cli("diff", "a.pth", "b.pth", "--json", code=1 if wanted else 0).json) == wanted


def test_an_expanded_tensor_equals_its_copied_elements(cli: Cli) -> None:
    torch.save({"v": torch.ones(1).expand(1 << 20, 1 << 10)}, "a.pth")
    torch.save({"v": torch.full((1,), 3.0).expand(1 << 20, 1 << 10)}, "b.pth")
    assert shown(cli("diff", "a.pth", "b.pth", "--json", code=1).json) == {"v": {"values": 2.0}}


def test_different_ties_are_noted_and_are_not_a_difference(cli: Cli) -> None:
    w = torch.randn(2, 2)
    torch.save({"a": w, "b": w}, "a.pth")
    torch.save({"a": w, "b": w.clone()}, "b.pth")
    assert "b and a are one tensor in a.pth, and two in b.pth" in cli("diff", "a.pth", "b.pth").err
    assert "one tensor in a.pth, and two in b.pth" in cli("diff", "b.pth", "a.pth").err


# --- models of every kind ------------------------------------------------------------------------------------------


def test_builders_classes_and_files(cli: Cli) -> None:
    assert "are the same" in cli("diff", "nets.py:Net", "nets.py:Net").out
    cli("save", "net.pth", "-m", "nets.py:Net")
    assert "are the same" in cli("diff", "nets.py:Net", "net.pth").out
    assert cli("diff", "nets.py:Net", "net.pth", "--seed", 3, "--json", code=1).json["modules"] == []
    torch.manual_seed(3)
    torch.save(nn.Linear(2, 3).state_dict(), "own.pth")
    cli("diff", "Linear(2,3)", "own.pth", "--seed", 3)
    cli("diff", "Linear(2,3)", "own.pth", "--seed", 4, code=1)
    cli("diff", "Linear(2,3)", "own.pth", "--seed", 4, "--no-values")
    cli("diff", "Linear(2,3)", "own.pth", "--seed", 3, "--arch", "Linear(2,3)")


def test_buffers_that_are_not_saved(cli: Cli) -> None:
    cli("save", "a.pth", "-m", "nets.py:Tied")
    torch.save(dict(torch.load("a.pth", weights_only=True)), "bare.pth")
    assert "are the same" in cli("diff", "a.pth", "bare.pth").out
    for pair in (("a.pth", "a.pth"), ("a.pth", "nets.py:Tied"), ("nets.py:Tied", "a.pth")):
        assert "are the same" in cli("diff", *pair).out
        cli("check", pair[0], "--same-as", pair[1])
    rows = cli("diff", "nets.py:Tied", "nets.py:Tied(width=5)", "-s", "positions", "--json", code=1).json["tensors"]
    assert [(row["name"], row["change"], row["before"], row["after"]) for row in rows] == [
        ("positions", "shape", [4], [5])
    ]


def test_a_key_for_each_side(cli: Cli) -> None:
    torch.save({"model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}, "epoch": 3}, "train.pth")
    assert "took the state dict" in cli("diff", "train.pth", "train.pth").err
    assert shown(cli("diff", "train.pth", "train.pth", "--key", "model", "--key", "ema", "--json", code=1).json)["w"]
    cli("diff", "train.pth", "train.pth", "--key", "ema")
    cli("diff", "train.pth", "train.pth", "--key", "ema", "--key", "ema", "--key", "ema", code=2)


def test_a_file_with_foreign_objects_is_compared_with_a_warning(cli: Cli) -> None:
    torch.save(nn.Linear(2, 2), "whole.pth")
    assert "also holds objects of torch.nn.modules.linear.Linear" in cli("diff", "whole.pth", "whole.pth", "-q").err


# --- what is compared ----------------------------------------------------------------------------------------------


def test_selectors_tolerance_and_structure_alone(cli: Cli) -> None:
    torch.save({"a.w": torch.zeros(2), "b.w": torch.zeros(2), "c.w": torch.zeros(1)}, "a.pth")
    torch.save({"a.w": torch.full((2,), 1e-3), "b.w": torch.ones(2), "d.w": torch.zeros(1)}, "b.pth")

    def names(*words: object, code: int = 1) -> list[str]:
        return [row["name"] for row in cli("diff", "a.pth", "b.pth", "--json", *words, code=code).json["tensors"]]

    assert names() == ["a.w", "b.w", "c.w", "d.w"]
    assert names("-s", "a") == ["a.w"]
    assert names("-s", "a", "-s", "d") == ["a.w", "d.w"]
    assert names("-s", "{a,b}.w", "--except", "b") == ["a.w"]
    assert names("--atol", "0.01") == ["b.w", "c.w", "d.w"]
    assert names("-s", "a", "--atol", "0.01", code=0) == []
    assert names("-s", "a", "--no-values", code=0) == []
    assert names("--no-values") == ["c.w", "d.w"]
    assert names("--rtol", "1") == ["c.w", "d.w"]
    assert names("--rtol", "0.5", "-s", "a", "-s", "b") == ["a.w", "b.w"]
    assert names("--rtol", "0.5", "--atol", "6e-4", "-s", "a", "-s", "b") == ["b.w"]
    for wrong in ("-1", "nan"):
        assert "is not a limit that differences can have" in cli("diff", "a.pth", "b.pth", "--atol", wrong, code=2).err
        assert "is not a limit for relative differences" in cli("diff", "a.pth", "b.pth", "--rtol", wrong, code=2).err


def test_a_selector_that_picks_nothing_is_a_wrong_request(cli: Cli) -> None:
    torch.save({"classifier.w": torch.zeros(2)}, "a.pth")
    assert "clasifier" in cli("diff", "a.pth", "a.pth", "-s", "clasifier", code=2).err


def test_a_file_that_is_not_there(cli: Cli) -> None:
    torch.save({"w": torch.zeros(2)}, "a.pth")
    assert "no such file: b.pth" in cli("diff", "a.pth", "b.pth", code=2).err


# --- how it looks --------------------------------------------------------------------------------------------------


def test_the_table(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("save", "a.pth", "-m", BASE)
    cli("apply", "-m", "a.pth", "-o", "b.pth", "-e", "replace 4 Linear(_,5)", "-e", "init 3 'constant(1)'")
    lines = cli("diff", "a.pth", "b.pth", code=1).out.splitlines()
    assert lines[0].split() == ["name", "kind", "change", "before", "after", "max", "abs", "diff"]
    assert lines[1].split() == ["4", "module", "config", "out_features=2", "out_features=5", "-"]
    assert "Tensors:            4 differ, 7 are equal" in lines
    assert any(line.startswith("Largest difference: ") and line.endswith("in 3.weight") for line in lines)
    from modelcli.cli import main

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["diff", "a.pth", "b.pth"]) == 1
    assert all(len(line) <= 80 for line in terminal.getvalue().replace("\x1b", "").splitlines() if "[" not in line)
    assert "out_features=5" in terminal.getvalue()


def test_csv_has_the_same_columns_whatever_differs(cli: Cli) -> None:
    torch.save({"w": torch.zeros(2)}, "a.pth")
    torch.save({"w": torch.ones(2)}, "b.pth")
    assert cli("diff", "a.pth", "b.pth", "-f", "csv", code=1).out.splitlines() == [
        "name,kind,change,before,after,max_abs_diff",
        "w,tensor,values,,,1.0",
    ]
    assert cli("diff", "a.pth", "a.pth", "-f", "csv").out.splitlines() == ["name,kind,change,before,after,max_abs_diff"]


# --- what is read --------------------------------------------------------------------------------------------------


def fresh(folder: Path, words: str) -> tuple[set[str], int, int]:
    """Run a command in a new process. Returns the modules it imports, its exit code, and its peak memory in KiB."""
    code = """
        import sys
        from modelcli.cli import main
        code = main(sys.argv[1:])
        with open("/proc/self/status") as file:
            peak = next(line for line in file if line.startswith("VmHWM")).split()[1]
        print(code, peak, *sys.modules)
    """
    run = [sys.executable, "-c", textwrap.dedent(code), *words.split()]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    code_, peak, *names = done.stdout.splitlines()[-1].split()
    return set(names), int(code_), int(peak)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_torch_is_not_imported_for_two_files(cli: Cli, folder: Path) -> None:
    state = {"a.w": torch.randn(4), "b.w": torch.randn(4)}
    torch.save(state, "a.pth")
    save_file(state, "same.safetensors")
    torch.save({**state, "b.w": torch.randn(5)}, "shape.pth")
    torch.save({**state, "b.w": torch.randn(4)}, "values.pth")
    os.link("values.pth", "link.pth")
    for words, wanted, torch_too in (
        ("diff a.pth same.safetensors", 0, False),
        ("diff a.pth shape.pth", 1, False),
        ("diff a.pth values.pth --no-values", 0, False),
        ("diff values.pth link.pth", 0, False),
        ("diff a.pth values.pth -s a", 0, False),
        ("diff a.pth values.pth", 1, False),
        ("diff a.pth values.pth --atol 1e-3", 1, False),
        ("diff a.pth Linear(2,2) --no-values", 1, True),
    ):
        modules, code, _ = fresh(folder, words)
        assert (code, "torch" in modules) == (wanted, torch_too), words


@pytest.mark.skipif(not hasattr(os, "link"), reason="needs hard links")
def test_a_file_and_its_link_are_equal_without_reading(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.randn(100)}, "a.pth")
    os.link("a.pth", "b.pth")
    Path("c.pth").symlink_to("a.pth")

    def read(*_: object) -> bytes:
        raise AssertionError("nothing has to be read")

    monkeypatch.setattr(byte_comparison.ByteComparison, "_read", read)
    for other in ("a.pth", "b.pth", "c.pth"):
        cli("diff", "a.pth", other)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, and sparse files")
@pytest.mark.parametrize("differ", [False, True])
def test_large_files_in_bounded_memory(folder: Path, differ: bool) -> None:
    """768 MB on each side are compared with less than 50 MB beyond the memory of the program itself."""
    shapes = {f"{number}.w": [1 << 26] for number in range(3)}
    for name in ("a", "b"):
        sparse_file(folder / f"{name}.safetensors", shapes)
    if differ:
        with (folder / "b.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(struct.pack("<f", 2.5))
        sparse_file(folder / "small.safetensors", {"w": [2]})
        torch.save({"w": torch.ones(2)}, "small.pth")
        _, _, peak = fresh(folder, "diff small.safetensors small.pth")
    else:
        peak = 30_000
    modules, code, found = fresh(folder, "diff a.safetensors b.safetensors --json")
    assert (code, "torch" in modules) == (int(differ), False)
    assert found < peak + 50_000


def test_many_small_tensors_share_open_files(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"{number}.w": torch.tensor([float(number)]) for number in range(300)}
    save_file(state, "a.safetensors")
    torch.save(state, "b.pth")
    opened = []
    original = byte_comparison.ByteComparison._open

    def opening(self: byte_comparison.ByteComparison, span: Span) -> FileIO:
        opened.append(span.path)
        return original(self, span)

    monkeypatch.setattr(byte_comparison.ByteComparison, "_open", opening)
    cli("diff", "a.safetensors", "b.pth")
    assert len(opened) == 2


@pytest.mark.parametrize("differ", [False, True])
def test_progress_ends_at_the_total(cli: Cli, folder: Path, differ: bool) -> None:
    state = {"a": torch.zeros(3 << 20), "b": torch.zeros(5), "c": torch.zeros(0)}
    torch.save(state, "a.pth")
    if differ:
        state["a"][-1] = state["b"][2] = 1
    save_file(state, "b.safetensors")
    sides = [diff.open_side(Source(path), values=True) for path in ("a.pth", "b.safetensors")]
    told: list[tuple[int, int, str]] = []
    found = diff.compare(sides[0], sides[1], ("a", "b"), progress=lambda *told_: told.append(told_))
    total = sum(tensor.nbytes for tensor in state.values())
    assert found.same is not differ
    assert told[0] == (0, total, "comparing")
    assert told[-1] == (total, total, "comparing")
    assert len(told) > 10
    assert max(done for done, _, _ in told) == total


def test_overlapping_views_are_not_read_without_limit(cli: Cli, folder: Path) -> None:
    """Each of the tensors shows a whole storage, so that their bytes exceed the limit for a file of this size."""
    base = torch.zeros(1 << 20)
    other = torch.zeros(1 << 20)
    torch.save({f"{n}": base[n:] for n in range(200)}, "a.pth")
    torch.save({f"{n}": other[n:] for n in range(200)}, "b.pth")
    assert "MODELCLI_MAX_EXPANSION" in cli("diff", "a.pth", "b.pth", code=4).err
    torch.save({f"{n}": base for n in range(200)}, "c.pth")
    torch.save({f"{n}": other for n in range(200)}, "d.pth")
    cli("diff", "c.pth", "d.pth")


def test_a_file_that_changes_meanwhile_is_an_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pth", "b.pth"):
        torch.save({"w": torch.zeros(4)}, name)
    original = byte_comparison.ByteComparison.same

    def same(self: Any, *args: Any) -> bool:
        torch.save({"w": torch.zeros(9)}, "b.pth")
        return original(self, *args)

    monkeypatch.setattr(byte_comparison.ByteComparison, "same", same)
    assert "changed while it was being read" in cli("diff", "a.pth", "b.pth", code=4).err


@pytest.mark.usefixtures("folder")
def test_one_key_applies_to_the_side_that_is_a_training_checkpoint(cli: Cli) -> None:
    """An averaged model is compared with its own export."""
    state = nn.Linear(2, 3).state_dict()
    torch.save({"model": {name: tensor + 1 for name, tensor in state.items()}, "ema": state}, "train.pth")
    torch.save(state, "bare.pth")
    cli("save", "ema.safetensors", "-m", "train.pth", "--key", "ema")
    for export in ("ema.safetensors", "bare.pth"):
        cli("diff", "train.pth", export, "--key", "ema")
        cli("diff", export, "train.pth", "--key", "ema")
        cli("diff", export, "train.pth", "--key", "model", code=1)
    assert "no key 'ema' in bare.pth" in cli("diff", "bare.pth", "bare.pth", "--key", "ema", code=2).err


@pytest.mark.usefixtures("folder")
def test_a_note_names_a_prefix_that_only_one_side_has(cli: Cli) -> None:
    state = nn.Linear(2, 3).state_dict()
    torch.save(state, "a.pth")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, "b.pth")
    told = "every name in b.pth begins with 'module.': modelcli rename 'module.**' '**' removes it"
    assert told in cli("diff", "a.pth", "b.pth", code=1).err
    assert told in cli("diff", "b.pth", "a.pth", code=1).err
    assert "begins with" not in cli("diff", "b.pth", "b.pth").err
    cli("rename", "module.**", "**", "-m", "b.pth", "-o", "c.pth")
    cli("diff", "a.pth", "c.pth")
