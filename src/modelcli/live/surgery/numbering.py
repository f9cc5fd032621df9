"""The numbered children and tensors of a module of unknown type, and how they move when one comes or goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from modelcli.edits.picking import are_numbers
from modelcli.live import composites
from modelcli.live.build import Bare


def numbers_in(holder: Bare) -> list[int]:
    """The numbers by which something that lies directly in a module is called: a tensor, what else its file has there,
    a child."""
    kept = [hook.name for hook in holder._state_dict_hooks.values() if isinstance(hook, composites.Kept)]
    names = (*holder._parameters, *holder._buffers, *kept, *holder._modules)
    return [int(name) for name in names if are_numbers([name])]


def renumber(holder: Bare, number_of: Callable[[int], int]) -> None:
    """Give each child and tensor that is called by a number the one that it is to have; others keep their names."""

    def moved(name: str) -> str:
        return str(number_of(int(name))) if are_numbers([name]) else name

    for table in (holder._parameters, holder._buffers, holder._modules):
        entries = {moved(name): value for name, value in table.items()}
        table.clear()
        table.update(entries)  # type: ignore[arg-type]
    for key, hook in list(holder._state_dict_hooks.items()):
        if isinstance(hook, composites.Kept):
            holder._state_dict_hooks[key] = replace(hook, name=moved(hook.name))
