"""What the code of a module's class says about its attributes: which of them running the module reads."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn


@dataclass(frozen=True)
class Attributes:
    """The attributes of `self` that the code which runs in a forward pass mentions.

    Attributes:
        read: the names that it reads.
        optional: the names of those that it compares with None or tests for truth, so that None is a possible value.
    """

    read: frozenset[str]
    optional: frozenset[str]


#: What was found for each class: an edit asks once for each of its modules. A class that is gone is forgotten.
_FOUND: WeakKeyDictionary[type[nn.Module], Attributes | None] = WeakKeyDictionary()


def attributes_of(kind: type[nn.Module]) -> Attributes | None:
    """Return the attributes that a class reads when it runs; None if its source is not available. It is parsed once."""
    if kind not in _FOUND:
        _FOUND[kind] = _parsed(kind)
    return _FOUND[kind]


def _parsed(kind: type[nn.Module]) -> Attributes | None:
    """Parse the source of a class.

    The code that runs is `forward`, and every method or property of the class that it mentions, directly or not. Text
    alone is looked at: an attribute whose name is computed is not found.
    """
    read: set[str] = set()
    optional: set[str] = set()
    waiting, done = ["forward"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        code = _code_of(kind, name)
        if code is None:
            if name == "forward":
                return None
            continue
        for node in ast.walk(code):
            if (attribute := _attribute_of_self(node)) is not None:
                read.add(attribute)
                waiting.append(attribute)
            optional.update(_tested(node))
    return Attributes(frozenset(read), frozenset(optional & read))


def _code_of(kind: type[nn.Module], name: str) -> ast.AST | None:
    """Return the parsed source of a method or property of a class; None if it has none, or torch's base class does."""
    found = inspect.getattr_static(kind, name, None)
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    if not inspect.isfunction(found) or vars(nn.Module).get(name) is found:
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(found))))
    except (OSError, TypeError, SyntaxError, ValueError, RecursionError):
        return None


def _attribute_of_self(node: ast.AST) -> str | None:
    """Return the name in `self.name` or `getattr(self, "name")`; None for any other node."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Load()):
            return name
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr"), args=[ast.Name(id="self"), ast.Constant(value=str() as name), *_]
        ):
            return name
    return None


def _tested(node: ast.AST) -> Iterator[str]:
    """Yield the attributes of `self` that a node compares with None or tests for truth."""
    tested: list[ast.AST] = []
    match node:
        case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() | ast.Eq() | ast.NotEq()], comparators=[right]):
            if isinstance(right, ast.Constant) and right.value is None:
                tested.append(left)
        case ast.If(test=test) | ast.IfExp(test=test):
            tested.append(test)
        case ast.BoolOp(values=values):
            tested += values
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            tested.append(operand)
    for part in tested:
        if (name := _attribute_of_self(part)) is not None:
            yield name
