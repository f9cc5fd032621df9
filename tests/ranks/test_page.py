"""The page about large checkpoints shows the table that the simulation computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import simulated_ranks

PAGE = Path(__file__).parents[2] / "docs" / "large-checkpoints.md"


def test_the_table_of_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    simulated_ranks.nodes()
    assert capsys.readouterr().out.strip() in PAGE.read_text()
