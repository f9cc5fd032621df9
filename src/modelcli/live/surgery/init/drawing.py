"""What `init` draws: the new values of tensors, made when they are first needed."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modelcli.edits.init import Init
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live import memory
from modelcli.live.meta_models import seeded
from modelcli.live.sources import Drawn, Lazy
from modelcli.live.surgery.storages import copied, key_of
from modelcli.wording import listed


@dataclass(frozen=True)
class Drawing:
    """The values that one edit draws.

    Attributes:
        filled: how each tensor is filled, by its first name; each value is one of `texts`.
        texts: the descriptions in `filled`, the one to show for several tensors first.
        tensors: the tensors of the model that `fill` needs.
        old: the same tensors with their present values.
        fill: writes new values into real copies of `tensors`, given in their order.
        lines: the edit as lines with literal paths.
        notes: notes on the edit.
        overwrites: whether `fill` replaces all elements, so that it does not need the old values.
    """

    filled: Mapping[str, str]
    texts: Sequence[str]
    tensors: Sequence[torch.Tensor]
    old: Sequence[torch.Tensor]
    fill: Callable[[Sequence[torch.Tensor]], None]
    lines: tuple[str, ...]
    notes: list[str]
    overwrites: bool = True


def drawn_sources(
    drawing: Drawing, views: Mapping[int, Sequence[torch.Tensor]], chosen: Collection[int], seed: int
) -> dict[int, Drawn]:
    """Return the sources of new bytes for the storages of the chosen tensors (by `id`). They are drawn on first use.

    `views` are the tensors that view each storage; all of them get the new values.
    """
    keys = [key_of(tensor) for tensor in drawing.tensors]
    blank = {key for key in keys if drawing.overwrites and _is_alone(views[key])}
    wanted = list(dict.fromkeys(key for key, tensor in zip(keys, drawing.tensors, strict=True) if id(tensor) in chosen))
    sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in zip(keys, drawing.old, strict=True)}
    old, fill = (
        drawing.old,
        drawing.fill,
    )  # not `drawing` itself: its tensors will hold what is built here, a reference cycle

    def build() -> nn.Module:
        memory.require(sum(sizes.values()), "init")
        fresh: dict[int, torch.UntypedStorage] = {}
        real = []
        for key, tensor in zip(keys, old, strict=True):
            if key not in fresh:
                fresh[key] = _zeros(sizes[key]) if key in blank else copied(tensor)
            empty = torch.empty(0, dtype=tensor.dtype)
            real.append(empty.set_(fresh[key], tensor.storage_offset(), tensor.size(), tensor.stride()))
        with seeded(seed), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the edit has already shown them as notes
            fill(real)
        holder = nn.Module()
        for key in wanted:
            holder.register_buffer(str(key), torch.empty(0, dtype=torch.uint8).set_(fresh[key]))
        return holder

    lazy = Lazy(build)
    return {key: Drawn(lazy, str(key), sizes[key]) for key in wanted}


def _is_alone(views: Sequence[torch.Tensor]) -> bool:
    """Whether a storage has one view, which covers it: then new values leave no old one."""
    return len(views) == 1 and views[0].numel() * views[0].element_size() == views[0].untyped_storage().nbytes()


def _zeros(nbytes: int) -> torch.UntypedStorage:
    return torch.zeros(nbytes, dtype=torch.uint8).untyped_storage()


def kept_notes(kept: Mapping[str, str]) -> list[str]:
    """A note for each reason why tensors keep their values."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, why in kept.items():
        by_reason[why].append(name)
    return [
        f"{listed(names, 5)} {'keeps its' if len(names) == 1 else 'keep their'} values: {why}"
        for why, names in by_reason.items()
    ]


def literals(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(map(selectors.literal, names))


def nothing_to_initialise(edit: Init, kept: Mapping[str, str] | None = None) -> RequestError:
    targets = ", ".join(edit.targets)
    if kept:
        name, why = next(iter(kept.items()))
        return RequestError(f"nothing to initialise in {targets}: {name}: {why}")
    return RequestError(f"nothing to initialise: {targets} has no parameters", "modelcli params lists the parameters")
