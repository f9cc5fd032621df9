"""The numbered children and tensors of a module of unknown type, and how they move when one comes or goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from modelcli.live import composites
from modelcli.live.build import Bare


def entry_names(holder: Bare) -> list[str]:
    """The names of all that lies directly in a module: its tensors, what else its file has there, its children."""
    kept = [hook.name for hook in holder._state_dict_hooks.values() if isinstance(hook, composites.Kept)]
    return [*holder._parameters, *holder._buffers, *kept, *holder._modules]


def renumber(holder: Bare, number_of: Callable[[int], int]) -> None:
    """Give each child and tensor, all called by numbers, the number that it is to have."""

    def moved(name: str) -> str:
        return str(number_of(int(name)))

    for table in (holder._parameters, holder._buffers, holder._modules):
        entries = {moved(name): value for name, value in table.items()}
        table.clear()
        table.update(entries)  # type: ignore[arg-type]
    for key, hook in list(holder._state_dict_hooks.items()):
        if isinstance(hook, composites.Kept):
            holder._state_dict_hooks[key] = replace(hook, name=moved(hook.name))
