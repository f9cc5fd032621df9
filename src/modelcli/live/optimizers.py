"""What a training checkpoint's optimizers know of the parameters that they were made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

#: How deep in a checkpoint an optimizer's state dict is looked for: Lightning has lists of them.
_DEPTH = 3


def unfit(tree: Any, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> list[str]:
    """A line for each optimizer in a checkpoint whose state no longer fits the model's parameters.

    `tree` is the checkpoint as inert values. `before` are the parameters that the model had when it was opened, in
    their order, and `after` those that it has: what an edit has put in the place of another is another object.

    `torch.optim` keeps its state by the position of a parameter in its `param_groups`, `model.parameters()` as a rule;
    other programs by name.
    """
    told = []
    for name, state, groups in _optimizers(tree):
        ids = [entry for group in groups for entry in _listed(group)]
        if any(isinstance(entry, str) for entry in ids):
            wrong = [entry for entry in ids if isinstance(entry, str) and after.get(entry) is not before.get(entry)]
        elif len(ids) != len(before):
            told.append(
                f"{name} holds state for {len(ids)} parameters, and the model had {len(before)}: "
                "whether it still fits is not known"
            )
            continue
        else:
            now = list(after.values())
            pairs = enumerate(before.items())
            wrong = [own for index, (own, p) in pairs if index >= len(now) or now[index] is not p]
            if not wrong and len(now) > len(before):
                wrong = list(after)[len(before) :]
        if wrong and state:
            listed = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
            told.append(f"the state in {name} no longer fits {listed}: make the optimizer anew")
    return told


def _optimizers(tree: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any, Sequence[Any]]]:
    """Every optimizer's state dict in a checkpoint: where it is, its state, its groups."""
    if isinstance(tree, dict):
        state, groups = tree.get("state"), tree.get("param_groups")
        if isinstance(state, dict) and isinstance(groups, list):
            yield path or "the file", state, groups
            return
        items: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return
    if depth < _DEPTH and len(items) < 1_000:
        for key, value in items:
            yield from _optimizers(value, f"{path}[{key!r}]" if path else str(key), depth + 1)


def _listed(group: Any) -> list[Any]:
    params = group.get("params") if isinstance(group, dict) else None
    return params if isinstance(params, list) else []
