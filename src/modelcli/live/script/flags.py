"""The statements of a script that set `requires_grad`."""

from __future__ import annotations

from torch import nn

from modelcli.live.script import access_paths
from modelcli.live.script.grouped_calls import each, largest
from modelcli.model.blueprint import Blueprint
from modelcli.model.tensors import TensorInfo


def flags(model: nn.Module, before: Blueprint, after: Blueprint) -> list[str]:
    """What gives each parameter the flag that it has in `after`: for whole modules where all of one take it."""
    lines = []
    for wanted in (False, True):
        named = {t.name for t in after.tensors if t.kind == "parameter" and t.requires_grad is wanted}
        changed = {t.name for t in before.tensors if t.name in named and t.requires_grad is not wanted}

        def is_meant(info: TensorInfo, named: set[str] = named, wanted: bool = wanted) -> bool:
            # Whole numbers cannot be trained: a module with such a parameter refuses.
            return info.kind == "buffer" or (info.name in named and not (wanted and not info.is_differentiable))

        modules, tensors = largest(model, before, changed, is_meant, "requires_grad_")
        statement = f".requires_grad_({wanted})"
        lines += each(modules, lambda path: access_paths.place(model, path), "get_submodule", statement)
        lines += each(tensors, lambda name: access_paths.tensor(model, name), "get_parameter", statement)
    return lines or ["# nothing changes: the flags are set already"]
