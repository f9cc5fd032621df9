"""The estimates of `modelcli memory` compared with peaks that were measured on a GPU: see `measure_memory.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import measure_memory
from tests.gpu.measure_memory import CASES, MODELS, TABLE, Case, Measured, estimate, measure
from tests.sampling import sampled

#: How far an estimate may be from the measured peak, and in how large a share of the cases.
TOLERANCE, SHARE = 0.1, 0.9

#: Why the estimate of a case (`model, case`) is farther from the measured peak. Each such case needs a reason.
EXPLAINED: dict[str, str] = {}


def table() -> dict[str, Any]:
    if not TABLE.exists():
        pytest.skip(f"no peaks were measured on a GPU yet: {TABLE.name} is made by measure_memory.py on one")
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def workspaces_of(capability: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cuBLAS have the workspace that it had on the GPU of the table."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8" if capability[0] >= 9 else ":4096:2:16:8")


def test_most_estimates_are_near_what_was_measured() -> None:
    rows = [row for row in table()["rows"] if "ratio" in row]
    far = {f"{row['model']}, {row['case']}" for row in rows if abs(row["ratio"] - 1) > TOLERANCE}
    assert len(far) <= (1 - SHARE) * len(rows)
    assert far <= EXPLAINED.keys(), "each case that is farther away needs a reason in EXPLAINED"
    assert len({row["model"] for row in rows}) >= 12


@pytest.mark.parametrize("pair", sampled([(model, case) for model in MODELS for case in CASES], 17))
def test_the_estimate_is_still_the_one_of_the_table(
    pair: tuple[Measured, Case], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table holds what was estimated when it was made; a change of the estimate is a change of how near it is."""
    model, case = pair
    found = table()
    row = next((row for row in found["rows"] if (row["model"], row["case"]) == (model.name, case.name)), None)
    assert row is not None, f"{model.name}, {case.name} is not in the table: make it anew"
    if "error" in row:
        pytest.skip(f"it could not be measured: {row['error']:.100}")
    workspaces_of(found["capability"], monkeypatch)
    estimated = estimate(model, case)["peak_bytes"]
    if abs(row["ratio"] - 1) <= TOLERANCE:
        assert estimated == pytest.approx(row["allocated"], rel=TOLERANCE)


@pytest.mark.parametrize("pair", sampled([(model, case) for model in MODELS for case in CASES], 31))
def test_the_script_can_estimate_each_of_its_cases(pair: tuple[Measured, Case], folder: Path) -> None:
    """Without a GPU too, so that a run on one does not end in an error that could have been seen before."""
    model, case = pair
    found = estimate(model, case)
    assert found["batch"] == model.batch
    assert found["train"] == case.optimizer
    assert found["peak_bytes"] > found["parts"]["params"] > 0
    if case.head_only:
        assert 0 < found["parts"]["gradients"] < found["parts"]["params"] / 2 or model.name in ("alexnet", "llama")


def test_inference_is_measured_before_training() -> None:
    """What training leaves behind would count for it."""
    trains = [case.optimizer is not None for case in CASES]
    assert trains == sorted(trains)


TINY = (Measured("squeezenet1_1", 1, "classifier.1"), Measured("bert", 1, "classifier", tokens=4))


@pytest.mark.parametrize("pair", sampled([(model, case) for model in TINY for case in CASES], 6))
def test_the_script_can_make_each_step(pair: tuple[Measured, Case]) -> None:
    """On the CPU, where nothing is measured."""
    assert measure(*pair, device="cpu") == {}


def test_a_model_that_ends_early_is_listed_with_its_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row that was measured stays, and what the process said last is in the table."""
    import torch

    row = {"model": "alexnet", "case": "inference", "allocated": 10, "estimated": 11, "ratio": 1.1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure_memory, "machine", lambda: {"gpu": "a GPU"})
    monkeypatch.setattr(measure_memory, "_run", lambda _name: (f"ROW {json.dumps(row)}\nother\n", "out of memory"))
    monkeypatch.setattr("sys.argv", ["measure_memory.py", "--out", str(tmp_path / "table.json"), "--models", "alexnet"])
    assert measure_memory.main() == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["gpu"] == "a GPU"
    assert table["rows"] == [row, {"model": "alexnet", "case": "the rest", "error": "out of memory"}]


def test_without_a_gpu_the_script_says_so(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["measure_memory.py"])
    assert measure_memory.main() == 1
    assert "no CUDA GPU" in capfd.readouterr().err
