"""What parameters and buffers add up to, each tied one once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from modelcli.model.paths import parent_of
from modelcli.model.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Totals:
    """What a model adds up to. Each tied tensor is counted once; bytes are what the tensors take in memory.

    `trainable_params` is None where nothing says of some parameter whether it is trained.
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
    """What parameters come to: their elements, and how many are trained, frozen, or neither for all that is known."""

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


def _counted_once(tensors: Sequence[TensorInfo]) -> Iterator[tuple[str, TensorInfo, int]]:
    """Where to count parameters, and how often, so that sums from the leaves to the root have each of them once.

    One with several names counts at each of its places, and is taken off again where the ways from two neighbouring
    places to the root meet: above, it would count twice.
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
        places = sorted(parent_of(tensor.name).split(".") for tensor in (first, *others))
        for place in places:
            yield ".".join(place), first, 1
        for place, neighbour in pairwise(places):
            yield _common(place, neighbour), first, -1


def _common(one: Sequence[str], other: Sequence[str]) -> str:
    """The path that two paths, in their components, start with."""
    return ".".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def totals_of(tensors: Iterable[TensorInfo]) -> Totals:
    """Add up tensors, each tied one once."""
    seen: set[str] = set()
    params = trainable = buffers = param_bytes = buffer_bytes = 0
    all_known = True
    for tensor in tensors:
        if (identity := tensor.identity) in seen:
            continue
        seen.add(identity)
        elements, nbytes = tensor.elements, tensor.nbytes
        if tensor.kind == "buffer":
            buffers += elements
            buffer_bytes += nbytes
        else:
            params += elements
            param_bytes += nbytes
            trainable += elements if tensor.is_trained else 0
            all_known = all_known and tensor.is_trained is not None
    return Totals(params, trainable if all_known else None, buffers, param_bytes, buffer_bytes)
