"""How programs call the files in which each rank saves its own part of a state dict: `model_world_size_4_rank_0.pt`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from modelcli.checkpoints.torch_pickle.names import SUFFIXES

_RANK = re.compile(r"(?P<front>.*?)(?:(?<=[_.-])|^)rank[_-]?(?P<rank>\d{1,6})(?P<behind>\D*)")
#: The beginnings of files that hold no part of a model.
_NOT_A_MODEL = ("optim", "extra", "rng", "random", "scheduler", "lr_", "dataloader", "sampler")


def rank_of(name: str) -> int | None:
    """Return the rank in the name of such a file; None for any other file."""
    match = _match(name)
    return None if match is None else int(match["rank"])


def _match(name: str) -> re.Match[str] | None:
    return _RANK.fullmatch(name) if name.lower().endswith(SUFFIXES) else None


def sets_in(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """Return the files of each name without its rank that may hold a model, by the rank."""
    found: dict[str, dict[int, str]] = {}
    for name in sorted(names):
        if (match := _match(name)) is not None and not name.startswith(_NOT_A_MODEL):
            found.setdefault(f"{match['front']}rank*{match['behind']}", {}).setdefault(int(match["rank"]), name)
    return found
