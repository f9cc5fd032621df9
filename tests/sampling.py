"""Run a part of many alike cases in `make test`, and all of them in `make test-long`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def sampled(cases: Sequence[Any], one_in: int) -> list[Any]:
    """Return parameters of a test for these cases: all but every `one_in`-th, from the first on, are marked `sweep`."""
    return [
        pytest.param(case, marks=() if position % one_in == 0 else pytest.mark.sweep)
        for position, case in enumerate(cases)
    ]


def rotated(cases: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Return parameters for all pairs of a case and another value; each case has one that is not marked `sweep`."""
    return [
        pytest.param(case, other, marks=() if position % len(others) == number else pytest.mark.sweep)
        for position, case in enumerate(cases)
        for number, other in enumerate(others)
    ]
