"""replace --keep-weights: copy values of the old module that mean the same in the new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from modelcli.edits.kept_weights import NOTHING, OVERLAP
from modelcli.errors import RequestError
from modelcli.live.sources import (
    AnySource,
    Computed,
    copy_into,
    halves,
    is_lazy,
    named_tensors,
    real_storage,
    require_source,
)
from modelcli.live.surgery import layouts
from modelcli.live.surgery.core import brief
from modelcli.live.surgery.storages import byte_span, has_storage, replace_storage, viewers
from modelcli.live.surgery.value_rules import ResampledKernels, ValueRule, rule_for
from modelcli.wording import listed


@dataclass(frozen=True)
class KeptPart:
    """The part of a new tensor that gets old values: its size from 0 along each axis. `transposed`: the old tensor has
    its two axes swapped. `rule`: how the old values get another shape first."""

    sizes: tuple[int, ...]
    transposed: bool = False
    rule: ValueRule | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of the old tensor with the axes of the new one."""
        whole = tensor.t() if self.transposed else tensor
        whole = whole if self.rule is None else self.rule.applied(whole)
        return whole[tuple(slice(size) for size in self.sizes)]


@dataclass(frozen=True)
class KeptFrom:
    """What weights are kept of: the old tensors by their names in it, it in a few words, its path, the new module.

    `carrying` tells how the values of a tensor go into the new one, given whether kernels are resampled: see
    `layouts.copy_rule`.
    """

    tensors: Mapping[str, torch.Tensor]
    brief: str
    path: str
    new: nn.Module
    carrying: Callable[[str, bool], layouts.CopyRule | None]


def of_module(old: nn.Module, path: str, new: nn.Module) -> KeptFrom:
    """What there is to keep of an old module at a path, for the new one."""
    return KeptFrom(named_tensors(old), brief(old), path, new, partial(_carrying, old, new))


def _carrying(old: nn.Module, new: nn.Module, name: str, resampled: bool) -> layouts.CopyRule | None:
    return layouts.copy_rule(name, old, new, resampled=resampled)


def keep_weights(groups: Sequence[KeptFrom], how: str) -> tuple[Mapping[str, Mapping[str, KeptPart]], list[str]]:
    """Copy the overlapping part of each tensor that means the same in the old modules and in the new ones.

    Args:
        groups: what to keep of each module.
        how: the word of `--keep-weights`.

    Returns what each module keeps, by its path, and notes.

    Raises RequestError if no tensor of any module has a counterpart.
    """
    kept = {old.path: overlap_of(old, how) for old in groups}
    if not any(kept.values()):
        first = groups[0]
        raise RequestError(
            f"--keep-weights keeps nothing of {first.path}: {type(first.new).__name__} has no tensor of the name and "
            f"number of dimensions of one of {first.brief}",
            "leave it out",
        )
    notes = []
    for old in groups:
        path = old.path
        if parts := kept[path]:
            _fill(old.tensors, old.new, parts)
            given, made = old.tensors, named_tensors(old.new)
            told = [f"{name}{_kept_part(part, given[name].shape, made[name].shape)}" for name, part in parts.items()]
            drawn = [name for name, tensor in made.items() if name not in parts and isinstance(tensor, nn.Parameter)]
            anew = f"; {listed(drawn, 4)} initialised" if drawn else ""
            of_old = f"of the old {old.brief}{anew}"
            notes.append(f"{path} keeps {listed(told, 4)} {of_old}")
        else:
            notes.append(f"{path} keeps no weights")
    if len(notes) > 4:
        notes = [f"{sum(map(bool, kept.values()))} of {len(kept)} modules keep their weights"]
    if how != OVERLAP and not any(part.rule for parts in kept.values() for part in parts.values()):
        notes.append(f"--keep-weights={how} keeps the overlap here: {NOTHING[how]}")
    return kept, notes


def overlap_of(old: KeptFrom, how: str) -> dict[str, KeptPart]:
    """Return the overlap of each tensor that means the same in both modules.

    Raises RequestError if a tensor, or the overlap of one, means something else in the new module.
    """
    given = old.tensors
    parts: dict[str, KeptPart] = {}
    for name, tensor in named_tensors(old.new).items():
        if name not in given or not _dense(tensor) or not _dense(given[name]):
            continue
        change = None if how == OVERLAP else rule_for(name, given[name], old.new, how)
        rule = old.carrying(name, isinstance(change, ResampledKernels))
        if rule is None:
            continue
        if rule.refusal is not None:
            raise RequestError(
                f"--keep-weights cannot carry over {old.path}: {rule.refusal}", "leave --keep-weights out"
            )
        shape = given[name].shape[::-1] if rule.transposed else given[name].shape
        if rule.transposed and how != OVERLAP:
            change = rule_for(name, given[name], old.new, how, transposed=True)
        if change is not None:
            shape = torch.Size(change.shape(tuple(shape)))
        parts[name] = KeptPart(tuple(map(min, tensor.shape, shape)), rule.transposed, change)
    return parts


def _dense(tensor: torch.Tensor) -> bool:
    return not is_lazy(tensor) and has_storage(tensor)


def _kept_part(part: KeptPart, old: torch.Size, new: torch.Size) -> str:
    """Return what of a tensor is kept, as text behind its name; empty for all of it."""
    if part.rule is None:
        return _extent(part, old, new)
    before = tuple(old[::-1] if part.transposed else old)
    shape = part.rule.shape(before)
    extent = _extent(part, torch.Size(shape[::-1] if part.transposed else shape), new)
    return f"{extent} ({part.rule.told(before)})"


def _extent(part: KeptPart, old: torch.Size, new: torch.Size) -> str:
    """Return the kept part of a tensor as text: `[:10,:]`; empty for all of it, `.T` for swapped axes."""
    if part.transposed:
        old = old[::-1]
    sizes = [":" if old[axis] == new[axis] else f":{size}" for axis, size in enumerate(part.sizes)]
    return (".T" if part.transposed else "") + ("" if old == new else f"[{','.join(sizes)}]")


def _fill(old: Mapping[str, torch.Tensor], new: nn.Module, parts: Mapping[str, KeptPart]) -> None:
    """Give the tensors of a new module the old values where they overlap, and new values elsewhere.

    On the meta device, the values are computed when they are needed, piece by piece.
    """
    before = {name: old[name].detach() for name in parts}
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(new).items():
        names.setdefault(id(tensor), []).append(name)
    for views in viewers(new).values():
        filled = [(view.detach(), name) for view in views for name in names[id(view)] if name in parts]
        if not filled:
            continue
        drawn = require_source(views[0])
        kept = []
        for view, name in filled:
            part = parts[name]
            kept.append((view[tuple(slice(size) for size in part.sizes)], part.of(before[name])))
        covered = any(view.is_contiguous() and view.nbytes == drawn.nbytes for view, _ in kept)
        compute = partial(
            _overlaid, None if covered else drawn, kept
        )  # a tensor that is covered completely need not be drawn
        reads = (drawn, *(require_source(numbers) for _, numbers in kept))
        replace_storage(views, Computed(drawn.nbytes, compute, reads))


def _overlaid(
    drawn: AnySource | None, kept: Sequence[tuple[torch.Tensor, torch.Tensor]], start: int, nbytes: int
) -> torch.UntypedStorage:
    """So many bytes of a new storage, from a start on: those that were drawn, and over them what is kept.

    `kept` are views of that storage, each with the old numbers that it is to show.
    """
    storage = torch.UntypedStorage(nbytes) if drawn is None else real_storage(drawn.part(start, nbytes)).cpu().clone()
    for view, numbers in kept:
        _lay(storage, start, view, numbers)
    return storage


def _lay(storage: torch.UntypedStorage, start: int, view: torch.Tensor, numbers: torch.Tensor) -> None:
    """Put numbers where a view of a storage shows them: those that lie in this piece of it, which starts at a byte."""
    first, end = byte_span(view)
    if end <= start or start + storage.nbytes() <= first:
        return
    if view.numel() > 1 and (first < start or start + storage.nbytes() < end):
        for half in halves(view):
            _lay(storage, start, view[half], numbers[half])
        return
    offset = int(view.storage_offset()) - start // view.element_size()
    copy_into(torch.empty(0, dtype=view.dtype).set_(storage, offset, view.size(), view.stride()), numbers)
