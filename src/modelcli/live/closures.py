"""Copy the functions of a model together with the model.

`copy.deepcopy` does not copy functions. A function whose closure or defaults hold a module (the hook of a feature
extractor: `lambda m, i, o: self.features.append(o)`) would therefore still work on the original model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import CellType, FunctionType
from typing import Any

from torch import nn

from modelcli.live import signatures
from modelcli.live.walking import modules_in

#: The most functions and containers to look through; further ones are not copied.
_MOST = 100_000


class Functions:
    """Copies of the functions, in a model's attributes and hooks, that have a closure or defaults.

    The constructor puts the copies into `memo`, with which the caller then copies the model. After that, `fill` gives
    the copied functions the copied objects.
    """

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self.memo = memo
        self.copies: list[tuple[FunctionType, FunctionType]] = []
        self.cells: dict[int, tuple[CellType, CellType]] = {}
        for function in _functions(model):
            cells = tuple(map(self._cell, function.__closure__ or ()))
            made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
            made.__dict__.update(function.__dict__)
            made.__qualname__, made.__module__, made.__doc__ = (
                function.__qualname__,
                function.__module__,
                function.__doc__,
            )
            signatures.copy_annotations(function, made)
            memo[id(function)] = made
            self.copies.append((function, made))

    def fill(self) -> None:
        """Fill the closures and defaults of the copies with the copied objects. Call it after copying the model."""
        for old, new in self.cells.values():
            try:
                value = old.cell_contents
            except ValueError:  # an empty cell
                continue
            new.cell_contents = self._in_copy(value)
        for old_function, new_function in self.copies:
            if old_function.__defaults__ is not None:
                new_function.__defaults__ = tuple(map(self._in_copy, old_function.__defaults__))
            if old_function.__kwdefaults__ is not None:
                pairs = old_function.__kwdefaults__.items()
                new_function.__kwdefaults__ = {name: self._in_copy(value) for name, value in pairs}

    def _cell(self, cell: CellType) -> CellType:
        return self.cells.setdefault(id(cell), (cell, CellType()))[1]

    def _in_copy(self, value: Any) -> Any:
        if id(value) in self.memo:
            return self.memo[id(value)]
        if type(value) in (list, dict, set, tuple):
            try:
                return copy.deepcopy(value, self.memo)
            except Exception:  # something in it cannot be copied
                return value
        return value


def _functions(model: nn.Module) -> Iterator[FunctionType]:
    """Yield the functions with a closure or defaults in the attributes of a model's modules and in their closures."""
    stack: list[Any] = [vars(child) for child in modules_in(model)]
    seen: set[int] = set()
    for _ in range(_MOST):
        if not stack:
            return
        value = stack.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            if value.__closure__ or value.__defaults__ or value.__kwdefaults__:
                yield value
                stack += [cell.cell_contents for cell in value.__closure__ or () if _is_set(cell)]
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif type(value) in (list, tuple, set):
            stack.extend(value)


def _is_set(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
