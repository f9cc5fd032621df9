"""The same call for many modules or tensors: for the largest modules that may take it, and in loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from modelcli.live.script.access_paths import is_of_torch
from modelcli.live.script.source_text import STATEMENTS, loop
from modelcli.live.walking import modules_in
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import lies_in, parent_of
from modelcli.model.tensors import TensorInfo


def largest(
    model: nn.Module, blueprint: Blueprint, changed: set[str], is_meant: Callable[[TensorInfo], bool], method: str
) -> tuple[list[str], list[str]]:
    """The outermost modules that hold changed tensors and only such as are meant, and the changed tensors elsewhere.

    `method` is what the modules are asked to do: those with a method of their own are left to what is in them.
    """
    wanted: dict[str, bool] = {}
    useful: set[str] = set()
    for info in blueprint.tensors:
        path = info.name
        while path:
            path = parent_of(path)
            wanted[path] = wanted.get(path, True) and is_meant(info)
            if info.name in changed:
                useful.add(path)
    modules: dict[str, None] = {}
    for module in blueprint.modules:
        path = module.path
        if path in useful and wanted[path] and not lies_in(path, modules) and _does(model.get_submodule(path), method):
            modules[path] = None
    # A tied tensor is the same one under all its names.
    done = {blueprint.by_name[name].identity for name in changed if lies_in(parent_of(name), modules)}
    tensors: dict[str, str] = {}
    for info in blueprint.tensors:
        if info.name in changed and info.identity not in done:
            tensors.setdefault(info.identity, info.name)
    return list(modules), list(tensors.values())


def _does(module: nn.Module, method: str) -> bool:
    """Whether a module does with its tensors what torch's method does: nothing that has a part in that is its own."""
    return is_of_torch(module, method) and all(
        is_of_torch(part, "_apply", "parameters", "named_parameters", "named_modules", "children")
        for part in modules_in(module)
    )


def each(names: Sequence[str], text: Callable[[str], str], getter: str, statement: str) -> list[str]:
    """The same call for each name: one below the other, or in a loop where there are many."""
    if len(names) <= STATEMENTS:
        return [f"{text(name)}{statement}" for name in names]
    return loop("name", names, f"model.{getter}(name){statement}")
