"""Sum up parameters and buffers, with each tied tensor counted once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from modelcli.model.paths import parent_of
from modelcli.model.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Totals:
    """The totals of a model: numbers of elements, and bytes in memory. Each tied tensor is counted once.

    `trainable_params` is None if it is not known of every parameter whether it is trainable.
    """

    params: int
    trainable_params: int | None
    buffers: int
    param_bytes: int
    buffer_bytes: int

    @property
    def non_trainable_params(self) -> int | None:
        return None if self.trainable_params is None else self.params - self.trainable_params


@dataclass(slots=True)
class _Sum:
    """The sums of some parameters: their elements, and how many are trained, frozen, or unknown."""

    elements: int = 0
    trained: int = 0
    frozen: int = 0
    unknown: int = 0

    def add(self, tensor: TensorInfo, times: int) -> None:
        self.elements += times * tensor.elements
        match tensor.is_trained:
            case True:
                self.trained += times
            case False:
                self.frozen += times
            case None:
                self.unknown += times

    def merge(self, other: _Sum) -> None:
        self.elements += other.elements
        self.trained += other.trained
        self.frozen += other.frozen
        self.unknown += other.unknown


NO_PARAMETERS = _Sum()


def _counted_once(tensors: Sequence[TensorInfo]) -> Iterator[tuple[str, TensorInfo, int]]:
    """Yield (path, parameter, times), such that sums from the leaves to the root count each parameter once.

    A tied parameter is counted (+1) in each module that holds it, and once less (-1) in the closest module above two
    neighbouring ones of these, where it would otherwise be counted twice.
    """
    tied: dict[str, list[TensorInfo]] = defaultdict(list)
    names = {tensor.tied_to for tensor in tensors if tensor.tied_to is not None}
    for tensor in tensors:
        if tensor.kind != "parameter":
            continue
        if tensor.tied_to is None and tensor.name not in names:
            yield parent_of(tensor.name), tensor, 1
        else:
            tied[tensor.identity].append(tensor)
    for first, *others in tied.values():
        holders = sorted(parent_of(tensor.name).split(".") for tensor in (first, *others))
        for holder in holders:
            yield ".".join(holder), first, 1
        for holder, neighbour in pairwise(holders):
            yield _common(holder, neighbour), first, -1


def _common(one: Sequence[str], other: Sequence[str]) -> str:
    """Return the longest path that two paths, given as components, have in common at the front."""
    return ".".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def totals_of(tensors: Iterable[TensorInfo]) -> Totals:
    """Sum up tensors, with each tied one counted once."""
    params = trainable = buffers = param_bytes = buffer_bytes = 0
    all_known = True
    for tensor, times in _alike(tensors):
        elements = times * tensor.elements
        nbytes = times * tensor.nbytes
        if tensor.kind == "buffer":
            buffers += elements
            buffer_bytes += nbytes
        else:
            params += elements
            param_bytes += nbytes
            trained = tensor.is_trained
            trainable += elements if trained else 0
            all_known = all_known and trained is not None
    return Totals(params, trainable if all_known else None, buffers, param_bytes, buffer_bytes)


def _alike(tensors: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, int]]:
    """Yield one of the tensors that add the same to the totals, and how many of them there are; a tied one counts once.

    A model of 100,000 tensors has few different ones.
    """
    distinct: Collection[TensorInfo] = tuple(tensors)
    if {tensor.tied_to for tensor in distinct} != {None}:
        first: dict[str, TensorInfo] = {}
        for tensor in distinct:
            first.setdefault(tensor.name if tensor.tied_to is None else tensor.tied_to, tensor)
        distinct = first.values()
    counts = Counter([(info.shape, info.dtype, info.kind, info.requires_grad, info.stored_bytes) for info in distinct])
    for (shape, dtype, kind, flag, stored_bytes), times in counts.items():
        yield TensorInfo("", shape, dtype, kind, flag, stored_bytes=stored_bytes), times
