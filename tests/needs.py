"""Marks for tests that need something of torch that the oldest supported version lacks.

A test names what it needs. On a torch that is too old to have it, the test is skipped with that name as the reason.
From `COMPLETE` on, the oldest torch that has everything named, no test is skipped, so that a missing name fails.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest
import torch

#: The oldest torch that has everything that tests need, so that no test may be skipped.
COMPLETE = (2, 13)


def torch_version() -> tuple[int, int]:
    """The first two parts of the version of torch."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    assert found is not None
    return int(found[1]), int(found[2])


def torch_has(name: str) -> bool:
    """Whether torch has this name, written without `torch.`: `float8_e8m0fnu`, `ops.aten._grouped_mm`, a module."""
    found: Any = torch
    path = "torch"
    for step in name.split("."):
        path += f".{step}"
        if not hasattr(found, step):
            try:
                importlib.import_module(path)
            except ImportError:
                return False
        found = getattr(found, step)
    return True


def what_torch_has(names: Iterable[str]) -> tuple[str, ...]:
    """Return those of `names` that torch has; from `COMPLETE` on all of them, so that a missing one fails a test."""
    return tuple(name for name in names if torch_version() >= COMPLETE or torch_has(name))


def needs_torch(*names: str) -> pytest.MarkDecorator:
    """Mark a test that is skipped if an older torch lacks one of `names`."""
    missing = [name for name in names if not torch_has(name)]
    return needs(f"a newer torch: {torch.__version__} has no torch.{', torch.'.join(missing)}", not missing)


def needs(what: str, met: bool) -> pytest.MarkDecorator:
    """Mark a test that is skipped on an older torch unless `met`; the reason says that the test needs `what`."""
    return pytest.mark.skipif(torch_version() < COMPLETE and not met, reason=f"needs {what}")


def each(cases: Collection[str], needed: Mapping[str, str] | None = None) -> list[Any]:
    """Return the parameters of a test, each marked with what it needs of torch.

    `needed` says what a case needs. Without it, each case is itself a name of torch, such as a dtype.
    """
    needed = dict(zip(cases, cases, strict=True)) if needed is None else needed
    assert needed.keys() <= set(cases)
    return [pytest.param(case, marks=needs_torch(needed[case])) if case in needed else case for case in cases]
