"""Get the signature of a callable, even if its annotations cannot be evaluated.

From Python 3.14 on, annotations are evaluated on access, and may name something that is imported only for type
checkers: `inspect.signature` then raises NameError. modelcli does not need the values of annotations.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any


def of(function: Callable[..., Any]) -> inspect.Signature:
    """The parameters of a callable; an annotation that names what is not there stays a text or a forward reference.

    Raises TypeError or ValueError as `inspect.signature` does: for what is not called, or does not say what it takes.
    """
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)


def copy_annotations(function: FunctionType, made: FunctionType) -> None:
    """Give one function the annotations of another, without evaluating them."""
    if sys.version_info >= (3, 14):
        made.__annotate__ = function.__annotate__
    else:
        made.__annotations__ = function.__annotations__
