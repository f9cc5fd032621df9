"""Signatures of callables whose annotations use undefined names, as Python 3.14 allows."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest

from modelcli.live import signatures
from modelcli.live.signatures import copy_annotations

#: The source of a module without `from __future__ import annotations`.
DEFERRED = """
class Net:
    def __init__(self, size: int, config: NotImported, *, dim: 'NotThere' = 2) -> None: ...
    def forward(self, x: NotImported, mask: NotImported | None = None) -> NotImported: ...
"""
deferred = pytest.mark.skipif(sys.version_info < (3, 14), reason="needs Python 3.14: it defers annotations")


def of_source(text: str, name: str) -> Any:
    space: dict[str, Any] = {}
    exec(compile(text, "own.py", "exec", dont_inherit=True), space)
    return space[name]


@deferred
def test_annotations_that_name_nothing_do_not_hide_the_parameters() -> None:
    net = of_source(DEFERRED, "Net")
    with pytest.raises(NameError):
        inspect.signature(net)
    assert list(signatures.of(net).parameters) == ["size", "config", "dim"]
    assert signatures.of(net).parameters["dim"].default == 2
    assert list(signatures.of(net(1, 2).forward).parameters) == ["x", "mask"]
    assert str(signatures.of(net).parameters["size"]) == "size: int"


@deferred
def test_annotations_are_copied_without_evaluating_them() -> None:
    forward = of_source(DEFERRED, "Net").forward
    made = FunctionType(forward.__code__, forward.__globals__, "forward", forward.__defaults__)
    copy_annotations(forward, made)
    assert str(signatures.of(made)) == str(signatures.of(forward))


@pytest.mark.parametrize("function", [lambda x, y=1: x, inspect.signature, of_source, dict.fromkeys, int.from_bytes])
def test_it_is_what_inspect_says(function: Callable[..., Any]) -> None:
    assert signatures.of(function) == inspect.signature(function)


def test_annotations_are_copied() -> None:
    made = FunctionType(of_source.__code__, of_source.__globals__)
    copy_annotations(of_source, made)
    assert made.__annotations__ == of_source.__annotations__ == {"text": "str", "name": "str", "return": "Any"}


@pytest.mark.parametrize(("function", "error"), [(3, TypeError), (type, ValueError)])
def test_what_has_no_parameters_is_refused_as_inspect_does(function: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        signatures.of(function)
