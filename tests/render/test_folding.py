"""`fold_rows`: equal rows of numbered siblings become one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.paths import ancestors
from modelcli.render.folding import fold_rows
from tests.conftest import Cli


def paths_of(*paths: str, looks: Any = None) -> list[str]:
    rows = [{"path": path, "look": (looks or {}).get(path)} for path in paths]
    return [fold.path for fold in fold_rows(rows, "path", lambda row: row["look"])]


def test_rows_with_consecutive_numbers_become_one_row() -> None:
    assert paths_of("a.0", "a.1", "a.2") == ["a.[0-2]"]
    assert paths_of("layer9.w", "layer10.w", "layer11.w") == ["layer[9-11].w"]
    assert paths_of("a.0", "a.2", "a.3", "b") == ["a.0", "a.[2-3]", "b"]
    assert paths_of("a.01", "a.02") == ["a.01", "a.02"]


def test_every_number_in_a_path_can_fold() -> None:
    many = [f"layers.{layer}.ln_{norm}" for layer in range(12) for norm in (1, 2)]
    assert paths_of(*many, "ln") == ["layers.[0-11].ln_[1-2]", "ln"]
    assert paths_of(*many[:-1]) == ["layers.[0-10].ln_[1-2]", "layers.11.ln_1"]


def test_rows_that_look_different_keep_their_own_row_and_position() -> None:
    assert paths_of("a.0", "a.1", "a.2", "a.3", looks={"a.1": "other"}) == ["a.0", "a.1", "a.[2-3]"]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from("ab")), unique=True, max_size=30))
def test_the_path_of_a_fold_selects_exactly_its_rows(places: list[tuple[int, int, str]]) -> None:
    paths = [f"x.{first}.{name}.{second}" for first, second, name in places]
    modules: dict[str, None] = dict.fromkeys(above for path in paths for above in [*ancestors(path)][::-1])
    blueprint = Blueprint(tuple(ModuleInfo(path, None) for path in ("", *filter(None, modules))), ())
    folds = fold_rows([{"path": path} for path in paths], "path", lambda _: None)
    for fold in folds:
        picked = selectors.select_modules(blueprint, [fold.path])
        assert sorted(picked) == sorted(row["path"] for row in fold.rows)
    assert sorted(row["path"] for fold in folds for row in fold.rows) == sorted(paths)


@pytest.fixture
def _terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelcli.cli.output.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("_terminal")
def test_equal_changes_of_an_edit_are_one_row_on_a_terminal(cli: Cli) -> None:
    shown = cli("replace", "**:GELU", "ReLU", "-m", "vit_b_16", "--check", "none")
    assert shown.out.count("->") == 1
    assert "encoder.layers.encoder_layer_[0-11].mlp.1" in shown.out
    assert "12 x GELU" in shown.out
    assert "11 changes folded into rows of similar ones: -f csv shows each" in shown.err
    assert len(cli("replace", "**:GELU", "ReLU", "-m", "vit_b_16", "--check", "none", "--json").json["changes"]) == 12


@pytest.mark.usefixtures("_terminal")
def test_a_fold_shows_the_sum_of_the_sizes_of_its_changes(cli: Cli) -> None:
    shown = cli("freeze", "**:LayerNorm", "-m", "vit_b_16", "--check", "none").out
    assert "encoder.layers.encoder_layer_[0-11].ln_[1-2]" in shown
    assert "36,864 params" in shown  # 24 norms of 2 x 768


@pytest.mark.usefixtures("_terminal")
def test_equal_differences_are_one_row_on_a_terminal(cli: Cli) -> None:
    cli("cast", "encoder.layers.**.mlp.0", "bfloat16", "-m", "vit_b_16", "-o", "half.pth", "--check", "none", "-q")
    shown = cli("diff", "vit_b_16", "half.pth", "--no-values", code=1)
    assert "encoder.layers.encoder_layer_[0-11].mlp.0.weight" in shown.out
    assert "differences folded into rows of similar ones: --expand shows each" in shown.err
    each = cli("diff", "vit_b_16", "half.pth", "--no-values", "--expand", code=1).out
    assert each.count("mlp.0.weight") == 12
