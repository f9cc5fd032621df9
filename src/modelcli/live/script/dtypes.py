"""The statements of a script that give tensors other dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from torch import nn

from modelcli.live.script import access_paths
from modelcli.live.script.grouped_calls import calls_on_each, group_by_module
from modelcli.live.script.source_text import SourceText, call, dedented
from modelcli.live.sources import named_tensors
from modelcli.live.surgery.storages import has_storage, key_of
from modelcli.model.blueprint import Blueprint
from modelcli.model.dtypes import FLOATING
from modelcli.model.tensors import TensorInfo

CAST_VIEWS = dedented('''
    def cast_views(tensors, dtype):
        """Convert tensors that are views of one storage, and let them be views of one storage again."""
        first = tensors[0].data
        size = first.untyped_storage().nbytes() // first.element_size()
        whole = first.as_strided((size,), (1,), 0).to(dtype)
        for tensor in tensors:
            tensor.data = whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
''')


def cast_statements(script: SourceText, model: nn.Module, before: Blueprint, after: Blueprint) -> list[str]:
    """Return the statements that give each tensor the dtype that it has in `after`.

    Whole modules are converted by `module.to(dtype)`, other tensors one by one.
    """
    dtypes = {t.name: after.by_name[t.name].dtype for t in before.tensors if after.by_name[t.name].dtype != t.dtype}
    lines = []
    for dtype in dict.fromkeys(dtypes.values()):
        changed = {name for name, wanted in dtypes.items() if wanted == dtype}
        # `module.to` would turn one shared buffer, or several views of one storage, into separate copies. So these
        # tensors are converted first, and `to` then finds them with the right dtype.
        apart, together = _shared(model, changed)
        lines += [_in_place(access_paths.tensor_expression(model, name), dtype) for name in apart]
        for names in together:
            script.helpers.setdefault(CAST_VIEWS)
            lines += call(
                "cast_views", [access_paths.tensor_expression(model, name) for name in names], f"torch.{dtype}"
            )
        done = {*apart, *itertools.chain(*together)}
        changed = {name for name in changed if before.by_name[name].identity not in done}

        def is_meant(info: TensorInfo, dtype: str = dtype) -> bool:
            # `to` converts complex numbers as well, and drops their imaginary parts.
            return not info.dtype.startswith("complex") and (
                info.dtype not in FLOATING or after.by_name[info.name].dtype == dtype
            )

        floating = {name for name in changed if dtype in FLOATING and before.by_name[name].dtype in FLOATING}
        modules, tensors = group_by_module(model, before, floating, is_meant, "to")
        lines += calls_on_each(
            modules, lambda path: access_paths.module_expression(model, path), "get_submodule", f".to(torch.{dtype})"
        )
        tensors += dict.fromkeys(
            before.by_name[t.name].identity for t in before.tensors if t.name in changed - floating
        )
        lines += [_in_place(access_paths.tensor_expression(model, name), dtype) for name in tensors]
    return lines or ["# nothing changes: the dtype is that already"]


def has_ties(model: nn.Module) -> bool:
    """Whether tensors of a model share a storage."""
    keys = [key_of(value) for value in named_tensors(model).values() if has_storage(value)]
    return len(set(keys)) < len(keys)


def _in_place(text: str, dtype: str) -> str:
    """Return the statement that converts a tensor in place, so that all modules that hold it keep the same object."""
    return f"{text}.data = {text}.data.to(torch.{dtype})"


def _shared(model: nn.Module, names: Collection[str]) -> tuple[list[str], list[list[str]]]:
    """Find the shared tensors among those with these names.

    Returns:
        The buffers that several modules hold, and groups of tensors that share a storage. Each tensor appears once,
        by its first name.
    """
    first: dict[int, str] = {}
    holders: dict[int, set[tuple[int, str]]] = {}
    storages: dict[object, dict[int, str]] = {}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, value in named_tensors(model).items():
        original = first.setdefault(id(value), name)
        above, _, own = name.rpartition(".")
        holders.setdefault(id(value), set()).add((id(model.get_submodule(above)), own))
        if name in names and has_storage(value):
            storages.setdefault((key_of(value), value.dtype), {}).setdefault(id(value), original)
    together = [list(group.values()) for group in storages.values() if len(group) > 1]
    grouped = set(itertools.chain(*together))
    apart = [name for key, name in first.items() if name in names and name in buffers and len(holders[key]) > 1]
    return [name for name in apart if name not in grouped], together
