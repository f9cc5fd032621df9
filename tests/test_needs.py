"""Tests are skipped only on an old torch, with a reason that names what torch lacks."""

from __future__ import annotations

import pytest
import torch

from tests import needs
from tests.needs import COMPLETE, each, needs_torch, torch_has, torch_version, what_torch_has


def test_names_of_torch_are_found() -> None:
    assert torch_has("float32")
    assert torch_has("ops.aten.mm.default")
    assert torch_has("distributed.checkpoint.filesystem.FileSystemWriter")
    assert not torch_has("float7")
    assert not torch_has("ops.aten._no_such_operator")
    assert not torch_has("distributed.no_such_module.Name")


def test_an_old_torch_skips_tests_and_the_reason_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    mark = needs_torch("float32", "float7").mark
    assert mark.args == (True,)
    assert mark.kwargs["reason"] == "needs a newer torch: 2.6.0+cu124 has no torch.float7"
    assert needs_torch("float32").mark.args == (False,)
    assert what_torch_has(("float32", "float7")) == ("float32",)


@pytest.mark.parametrize("version", ["2.13.0", "2.14.1+cpu", "2.100.0a0", "3.0.0"])
def test_a_new_torch_skips_nothing(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert needs_torch("float7").mark.args == (False,)
    assert needs.needs("anything", met=False).mark.args == (False,)
    assert what_torch_has(("float32", "float7")) == ("float32", "float7")


def test_cases_have_the_marks_that_they_need() -> None:
    plain, marked = each(("one", "two"), {"two": "float32"})
    assert plain == "one"
    assert marked.values == ("two",)
    assert [case.values for case in each(("float32", "float64"))] == [("float32",), ("float64",)]
    with pytest.raises(AssertionError):
        each(("one",), {"two": "float32"})


def test_the_version_is_read_as_two_numbers() -> None:
    assert torch_version() >= (2, 6)
    assert COMPLETE > (2, 6)
