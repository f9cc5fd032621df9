"""The statements of a script that set `requires_grad`."""

from __future__ import annotations

from torch import nn

from modelcli.live.script import access_paths
from modelcli.live.script.grouped_calls import calls_on_each, group_by_module
from modelcli.model.blueprint import Blueprint
from modelcli.model.tensors import TensorInfo


def requires_grad_statements(model: nn.Module, before: Blueprint, after: Blueprint) -> list[str]:
    """Return the statements that give each parameter the `requires_grad` that it has in `after`.

    If all parameters of a module get the same value, the statement is `module.requires_grad_(...)`.
    """
    lines = []
    for wanted in (False, True):
        named = {t.name for t in after.tensors if t.kind == "parameter" and t.requires_grad is wanted}
        changed = {t.name for t in before.tensors if t.name in named and t.requires_grad is not wanted}

        def is_meant(info: TensorInfo, named: set[str] = named, wanted: bool = wanted) -> bool:
            # torch raises an error if an integer parameter of a module should require gradients.
            return info.kind == "buffer" or (info.name in named and not (wanted and not info.is_differentiable))

        modules, tensors = group_by_module(model, before, changed, is_meant, "requires_grad_")
        statement = f".requires_grad_({wanted})"
        lines += calls_on_each(
            modules, lambda path: access_paths.module_expression(model, path), "get_submodule", statement
        )
        lines += calls_on_each(
            tensors, lambda name: access_paths.tensor_expression(model, name), "get_parameter", statement
        )
    return lines or ["# nothing changes: the flags are set already"]
