"""The same method call on many modules or tensors: on the outermost possible modules, and in loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from modelcli.live.script.access_paths import uses_torch_methods
from modelcli.live.script.source_text import STATEMENTS, loop
from modelcli.live.walking import modules_in
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import lies_in, parent_of
from modelcli.model.tensors import TensorInfo


def group_by_module(
    model: nn.Module, blueprint: Blueprint, changed: set[str], is_meant: Callable[[TensorInfo], bool], method: str
) -> tuple[list[str], list[str]]:
    """Cover the changed tensors by as few modules as possible.

    Args:
        model: the model.
        blueprint: the same model.
        changed: the names of the tensors to change.
        is_meant: whether a tensor may be changed when its whole module is.
        method: the method that is called on the modules. A module whose class overrides it is not used.

    Returns:
        The paths of the outermost modules that hold changed tensors and no tensor that must not change, and the names
        of the changed tensors in no such module.
    """
    allowed: dict[str, bool] = {}
    useful: set[str] = set()
    for info in blueprint.tensors:
        path = info.name
        while path:
            path = parent_of(path)
            allowed[path] = allowed.get(path, True) and is_meant(info)
            if info.name in changed:
                useful.add(path)
    modules: dict[str, None] = {}
    for module in blueprint.modules:
        path = module.path
        if (
            path in useful
            and allowed[path]
            and not lies_in(path, modules)
            and _uses_torch_method(model.get_submodule(path), method)
        ):
            modules[path] = None
    # A tied tensor is done under all its names once a module with one of them is.
    done = {blueprint.by_name[name].identity for name in changed if lies_in(parent_of(name), modules)}
    tensors: dict[str, str] = {}
    for info in blueprint.tensors:
        if info.name in changed and info.identity not in done:
            tensors.setdefault(info.identity, info.name)
    return list(modules), list(tensors.values())


def _uses_torch_method(module: nn.Module, method: str) -> bool:
    """Whether a module and the modules in it override neither this method nor those that torch's method calls."""
    return uses_torch_methods(module, method) and all(
        uses_torch_methods(part, "_apply", "parameters", "named_parameters", "named_modules", "children")
        for part in modules_in(module)
    )


def calls_on_each(names: Sequence[str], text: Callable[[str], str], getter: str, statement: str) -> list[str]:
    """Return the same call for each name: one statement for each name, or a loop if there are many.

    Args:
        names: the paths of modules, or the names of tensors.
        text: returns the expression for a name.
        getter: the method of the model that returns the object of a name, for the loop: `get_submodule`.
        statement: the call that follows the expression: `.eval()`.
    """
    if len(names) <= STATEMENTS:
        return [f"{text(name)}{statement}" for name in names]
    return loop("name", names, f"model.{getter}(name){statement}")
