"""Runs of siblings that look the same: a terminal shows each run as one row, and other outputs show every module."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import modelcli
from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint, LayerTrace, ModuleInfo, Trace
from modelcli.model.tensors import TensorInfo
from modelcli.render.documents import summary as summary_document
from modelcli.render.runs import Runs
from modelcli.render.writers import to_csv, to_plain
from tests.conftest import Cli
from tests.render.test_golden import Terminal


def stack(*names: str, holder: str = "layers") -> Blueprint:
    """Return a model with a list of blocks of these names, each with a norm and a linear layer."""
    modules = [ModuleInfo("", "Net", ("Net",)), ModuleInfo(holder, "ModuleList", ("ModuleList",))]
    tensors = []
    for path in (f"{holder}.{name}" for name in names):
        modules += [
            ModuleInfo(path, "Block", ("Block",)),
            ModuleInfo(f"{path}.norm", "LayerNorm", ("LayerNorm",), "(4,)"),
            ModuleInfo(f"{path}.lin", "Linear", ("Linear",), "in_features=4, out_features=4"),
        ]
        tensors += [
            TensorInfo(f"{path}.norm.weight", (4,), "float32", requires_grad=True),
            TensorInfo(f"{path}.lin.weight", (4, 4), "float32", requires_grad=True),
        ]
    layers = {module.path: LayerTrace([1, 4], 16) for module in modules}
    return Blueprint(tuple(modules), tuple(tensors), Trace(((1, 4),), layers, 100, 16, 64))


def paths(blueprint: Blueprint, *, traced: bool = True, **more: Any) -> list[str]:
    return [run.path for run in Runs(blueprint, traced=traced).below(**more)]


def changed(blueprint: Blueprint, path: str, **fields: Any) -> Blueprint:
    modules = tuple(replace(item, **fields) if item.path == path else item for item in blueprint.modules)
    return replace(blueprint, modules=modules)


def changed_tensor(blueprint: Blueprint, name: str, **fields: Any) -> Blueprint:
    tensors = tuple(replace(item, **fields) if item.name == name else item for item in blueprint.tensors)
    return replace(blueprint, tensors=tensors)


def test_a_run_is_one_row_with_its_children_once() -> None:
    assert paths(stack("0", "1", "2")) == [
        ".",
        "layers",
        "layers.[0-2]",
        "layers.[0-2].norm",
        "layers.[0-2].lin",
    ]
    assert paths(stack("0", "1", "2"), depth=2) == [".", "layers", "layers.[0-2]"]
    assert paths(stack("0", "1", "2"), top="layers.1") == ["layers.1", "layers.1.norm", "layers.1.lin"]


def test_names_that_end_in_the_next_number_are_a_run() -> None:
    assert paths(stack("block9", "block10", "block11"), depth=2)[2:] == ["layers.block[9-11]"]
    assert paths(stack("a", "b", "c"), depth=2)[2:] == ["layers.a", "layers.b", "layers.c"]
    assert paths(stack("0", "2", "3"), depth=2)[2:] == ["layers.0", "layers.[2-3]"]
    assert paths(stack("1", "0"), depth=2)[2:] == ["layers.1", "layers.0"]
    assert paths(stack("08", "09", "10"), depth=2)[2:] == ["layers.0[8-9]", "layers.10"]


@pytest.mark.parametrize(
    "other",
    [
        changed(stack("0", "1", "2", "3"), "layers.1", type="Other"),
        changed_tensor(stack("0", "1", "2", "3"), "layers.1.lin.weight", shape=(4, 5)),
        changed_tensor(stack("0", "1", "2", "3"), "layers.1.lin.weight", requires_grad=False),
        changed_tensor(stack("0", "1", "2", "3"), "layers.1.lin.weight", kind="buffer"),
    ],
    ids=["type", "shape", "trainable", "kind"],
)
def test_a_module_that_differs_is_not_part_of_a_run(other: Blueprint) -> None:
    assert paths(other, depth=2)[2:] == ["layers.0", "layers.1", "layers.[2-3]"]


@pytest.mark.parametrize(
    "other",
    [
        changed_tensor(stack("0", "1", "2", "3"), "layers.1.lin.weight", dtype="float16"),
        changed(stack("0", "1", "2", "3"), "layers.1.norm", absent=((0, "act"),)),
    ],
    ids=["dtype", "structure"],
)
def test_a_difference_that_no_row_shows_does_not_split_a_run(other: Blueprint) -> None:
    for traced in (True, False):
        assert paths(other, traced=traced, depth=2)[2:] == ["layers.[0-3]"]


def test_a_configuration_splits_runs_only_where_it_is_shown() -> None:
    """The blocks of a ConvNeXt differ in their stochastic-depth rate, which a tree shows and a summary does not."""
    other = changed(stack("0", "1", "2", "3"), "layers.1.lin", config="in_features=4, out_features=4, bias=False")
    assert paths(other, traced=True, depth=2)[2:] == ["layers.[0-3]"]
    assert paths(other, traced=False, depth=2)[2:] == ["layers.0", "layers.1", "layers.[2-3]"]


def test_equal_blocks_of_a_convnext_are_one_row(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelcli.cli.output.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert "features.5.[0-8] " in cli("summary", "convnext_tiny").out


def test_output_shapes_and_calls_split_runs_of_a_summary() -> None:
    found = stack("0", "1", "2")
    assert found.trace is not None
    layers = dict(found.trace.layers)
    for other in (layers | {"layers.2.norm": LayerTrace([1, 5], 16)}, {**layers, "layers.2.norm": None}):
        ran = {path: layer for path, layer in other.items() if layer is not None}
        seen = found.with_trace(replace(found.trace, layers=ran))
        assert paths(seen, depth=2)[2:] == ["layers.[0-1]", "layers.2"]
        assert paths(seen, traced=False, depth=2)[2:] == ["layers.[0-2]"]


def test_runs_within_runs() -> None:
    found = modelcli.blueprint(nn.Sequential(*(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))) for _ in range(4))))
    runs = list(Runs(found, traced=False).below())
    assert [run.path for run in runs] == [".", "[0-3]", "[0-3].[0-2]"]
    assert len(runs[-1].paths) == 12
    assert [Runs(found, traced=False).params_of(run) for run in runs] == [72, 72, 72]


def test_a_parameter_with_several_names_counts_once_in_a_run() -> None:
    block = nn.Linear(4, 4)
    model = nn.Sequential(*(nn.Sequential(block, nn.Linear(4, 4)) for _ in range(3)))
    found = modelcli.blueprint(model)
    runs = Runs(found, traced=False)
    rows = {run.path: runs.params_of(run) for run in runs.below()}
    assert rows["."] == sum(tensor.numel() for tensor in model.parameters()) == 80
    assert rows["[0-2]"] == 80  # all three, and the shared layer in them once
    assert rows["[0-2].0"] == 20
    assert rows["[0-2].1"] == 60


def test_time_for_many_tied_tensors_is_linear() -> None:
    """A small file can claim that thousands of tensors are tied."""
    modules, tensors = [ModuleInfo("", None)], []
    for block in range(3000):
        modules.append(ModuleInfo(f"b{block}x", None))
        for number in range(2):
            path = f"b{block}x.{number}"
            modules.append(ModuleInfo(path, None))
            tensors += [TensorInfo(f"{path}.{name}", (2,), "float32", tied_to=f"b0x.{number}.w") for name in "vw"]
    tensors[1] = replace(tensors[1], tied_to=None)
    found = Blueprint(tuple(modules), tuple(tensors))
    started = time.process_time()
    runs = Runs(found, traced=False)
    for run in runs.below():
        runs.params_of(run)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("reference", ["vit_b_16", "resnet50", "vgg11", "swin_t"])
def test_every_path_is_a_selector_that_picks_its_modules(reference: str) -> None:
    """A user can type any path that is shown, and no module is missing or shown twice."""
    found = modelcli.blueprint(reference)
    runs = list(Runs(found, traced=True).below())
    assert sorted(path for run in runs for path in run.paths) == sorted(module.path for module in found.modules)
    for run in runs:
        assert set(selectors.select_modules(found, [run.path])) == set(run.paths)
        assert Runs(found, traced=True).params_of(run) == sum(map(found.params_of, run.paths))


def test_a_very_deep_model_does_not_exhaust_the_stack() -> None:
    modules = tuple(ModuleInfo(".".join("a" * depth), None) for depth in range(3000))
    assert len(paths(Blueprint(modules, ()), traced=False)) == 3000


def test_the_rows_of_a_folded_summary_are_sums_and_the_document_is_whole() -> None:
    found = stack("0", "1", "2")
    shown = summary_document.summary("m", found, folded=True)
    row = {row["path"]: row for row in shown.rows}["layers.[0-2].lin"]
    assert (row["type"], row["params"], row["macs"], row["trainable"]) == ("3 x Linear", 48, 48, True)
    assert shown.folded == 6
    assert len(shown.document["layers"]) == len(found.modules)
    assert shown.document == summary_document.summary("m", found).document


def test_only_a_terminal_shows_the_share_bar() -> None:
    shown = summary_document.summary("m", stack("0", "1"))
    assert "share" in {column.key for column in shown.columns}
    assert "share" not in to_csv(shown)
    assert "█" not in to_plain(shown)


def test_trainable_is_optional_only_if_all_parameters_are_trainable() -> None:
    def optional(blueprint: Blueprint) -> int:
        columns = summary_document.summary("m", blueprint).columns
        return next(column.optional for column in columns if column.key == "trainable")

    assert optional(stack("0", "1"))
    assert not optional(changed_tensor(stack("0", "1"), "layers.1.lin.weight", requires_grad=False))


def test_sorting() -> None:
    found = stack("0", "1", "2")
    by_params = [row["path"] for row in summary_document.summary("m", found, sort="params").rows]
    assert by_params[:5] == [".", "layers", "layers.0", "layers.1", "layers.2"]
    assert by_params[5:8] == ["layers.0.lin", "layers.1.lin", "layers.2.lin"]
    by_path = [row["path"] for row in summary_document.summary("m", found, sort="path", folded=True).rows]
    assert by_path == sorted(by_path)
    by_macs = [row["path"] for row in summary_document.summary("m", found, sort="macs").rows]
    assert by_macs == [row["path"] for row in summary_document.summary("m", found, sort="mult-adds").rows]
    document = summary_document.summary("m", found, sort="params", folded=True).document
    assert [layer["path"] for layer in document["layers"]] == by_params


def test_a_summary_of_a_selection_keeps_the_totals_of_the_model(cli: Cli) -> None:
    whole, part = cli("summary", "alexnet", "--json").json, cli("summary", "alexnet", "-s", "features.*", "--json").json
    assert [row["path"] for row in part["layers"]] == [f"features.{number}" for number in range(13)]
    assert part["totals"] == whole["totals"]
    assert "classifer" in cli("summary", "alexnet", "-s", "classifer", code=2).err


def test_a_terminal_shows_three_digits_and_all_on_request(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert " 61,100,840 " in cli("summary", "alexnet").out
    monkeypatch.setattr("modelcli.cli.output.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    shown = cli("summary", "alexnet").out
    assert " 61.1M " in shown.partition("\n\n")[0]
    assert " 714M" in shown.partition("\n\n")[0]
    assert "61,100,840" in shown.partition("\n\n")[2]
    assert " 61,100,840 " in cli("summary", "alexnet", "--exact").out.partition("\n\n")[0]


def test_folded_on_a_terminal_and_complete_everywhere_else(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    model = "nets.py:build(depth=3)"
    torch.save(nn.Sequential(*(nn.Linear(2, 2) for _ in range(12))).state_dict(), "twelve.pth")

    def on_terminal(*words: str) -> tuple[str, str]:
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            patch.setenv("COLUMNS", "150")
            err = cli(*words).err
        return terminal.getvalue(), err

    for words in (("summary", "twelve.pth"), ("modules", "twelve.pth", "--tree")):
        out, err = on_terminal(*words)
        assert "[0-11]" in out
        assert "11 modules folded into rows of similar ones: --expand shows each" in err
        out, err = on_terminal(*words, "--expand")
        assert "[0-11]" not in out
        assert "--expand" not in err
        for format_ in ("table", "csv", "markdown", "json"):
            assert "[0-11]" not in cli(*words, "-f", format_).out
        assert "[0-11]" not in on_terminal(*words, "-f", "csv")[0]
    assert "cannot sort by 'parms'" in cli("summary", model, "--sort", "parms", code=2).err
