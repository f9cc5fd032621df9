"""What a test needs of torch beyond the oldest version that modelcli supports.

Such a test says so by name, and is skipped with that name as the reason where torch is too old to have it. It is never
skipped from `COMPLETE` on, the oldest torch that has everything named: what is missing there makes the test fail.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest
import torch

#: The oldest torch on which no test may be skipped for what torch lacks.
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
    """Those of `names` that torch has; all of them from `COMPLETE` on, where one that is gone is to fail a test."""
    return tuple(name for name in names if torch_version() >= COMPLETE or torch_has(name))


def needs_torch(*names: str) -> pytest.MarkDecorator:
    """Marks a test that is skipped where an older torch lacks one of `names`."""
    missing = [name for name in names if not torch_has(name)]
    return needs(f"a newer torch: {torch.__version__} has no torch.{', torch.'.join(missing)}", not missing)


def needs(what: str, met: bool) -> pytest.MarkDecorator:
    """Marks a test that is skipped on an older torch unless `met`; the reason says that the test needs `what`."""
    return pytest.mark.skipif(torch_version() < COMPLETE and not met, reason=f"needs {what}")


def each(cases: Collection[str], needed: Mapping[str, str] | None = None) -> list[Any]:
    """Parameters of a test, each marked with what it needs: the name of the case itself, or what `needed` has for it.

    Without `needed` the cases are names of torch's: dtypes, say.
    """
    needed = dict(zip(cases, cases, strict=True)) if needed is None else needed
    assert needed.keys() <= set(cases)
    return [pytest.param(case, marks=needs_torch(needed[case])) if case in needed else case for case in cases]
