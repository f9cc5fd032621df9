"""Which parameters an edited model's parameters were made of: what an optimizer's state has to know to follow.

A parameter's state (momentum, averages of squares) belongs to its values. So what counts is where the values of a
parameter come from, not its name or its position: a renamed parameter has the same values, a copy has them twice, and
`init` gives a parameter values that it did not have.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from modelcli.model.joined_tensors import Joined, seen_through
from modelcli.model.state_dict import Source, StateDictTensor
from modelcli.model.tensors import Shape


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter that a model has at one time.

    Attributes:
        identity: the parameter itself. Edits that rename or move a parameter keep it.
        values: where its elements come from, in their order. It is equal for two parameters with the same elements,
            and for one before and after a cast.
        shape: its shape; None for a lazy parameter.
        requires_grad: its flag; None if neither a file nor an edit states it.
        tensor: the tensor of a state-dict model; None for a live model.
    """

    identity: Hashable
    values: Hashable
    shape: Shape | None
    requires_grad: bool | None = None
    tensor: StateDictTensor | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Origin:
    """The old parameters that have the values of a parameter.

    Attributes:
        names: their names in the model as it was opened.
        made: None if the parameter has all elements of one of them, in the same shape; else the tensor, whose parts are
            views of them.
    """

    names: tuple[str, ...]
    made: StateDictTensor | None = None


def held_of(tensor: StateDictTensor) -> Held:
    """Return a parameter of a state-dict model."""
    seen = seen_through(tensor)
    values: Hashable = ("identity", tensor.identity)
    if seen.source is not None and seen.elements:
        values = (seen.source, seen.offset, seen.shape, seen.stride)
    return Held(tensor.identity, values, tensor.shape, tensor.requires_grad, tensor)


class OldParameters:
    """The parameters of a model as it was opened, found by their values."""

    def __init__(self, opened: Mapping[str, Held]) -> None:
        self.opened = opened
        self._by_identity = {held.identity: name for name, held in opened.items()}
        self._by_values: dict[Hashable, list[str]] = {}
        self._by_source: dict[Source, list[tuple[int, int, str]]] = {}
        for name, held in opened.items():
            self._by_values.setdefault(held.values, []).append(name)
            if held.tensor is not None and held.tensor.source is not None:
                self._by_source.setdefault(held.tensor.source, []).append((*_span(held.tensor), name))
        for source, spans in [*self._by_source.items()]:
            spans.sort()
            if any(later[0] < earlier[1] for earlier, later in pairwise(spans)):
                del self._by_source[source]  # which of them a view of these bytes belongs to is not known

    def same(self, held: Held) -> str | None:
        """Return the name that a parameter had when the model was opened; None for a parameter that is new."""
        return self._by_identity.get(held.identity)

    def origin(self, name: str, held: Held) -> Origin | None:
        """Return what a parameter's values come from; None if they are not those of old parameters alone."""
        if (whole := self._whole(name, held)) is not None:
            return Origin((whole,))
        if held.tensor is None or not isinstance(held.tensor.source, Joined):
            return None
        leaves = [self.leaf(part) for part in leaves_of(held.tensor)]
        if None in leaves:
            return None
        return Origin(tuple(dict.fromkeys(leaf for leaf in leaves if leaf is not None)), held.tensor)

    def _whole(self, name: str, held: Held) -> str | None:
        """Return the one old parameter with the same elements in the same shape."""
        found = self._by_values.get(held.values, [])
        if len(found) < 2:
            return found[0] if found else None
        same = self.same(held)  # several parameters with the same bytes
        return same if same in found else name if name in found else None

    def leaf(self, part: StateDictTensor) -> str | None:
        """Return the old parameter that a tensor is a view of."""
        if part.source is None:
            return None
        start, end = _span(part)
        spans = self._by_source.get(part.source, [])
        at = bisect_right(spans, start, key=lambda span: span[0]) - 1
        return spans[at][2] if at >= 0 and end <= spans[at][1] else None


def _span(tensor: StateDictTensor) -> tuple[int, int]:
    """Return the range of bytes of its source that a tensor is a view of, whatever it was cast to since."""
    return replace(tensor, dtype=tensor.cast_from[0], cast_from=()).byte_span if tensor.cast_from else tensor.byte_span


def leaves_of(tensor: StateDictTensor) -> Iterator[StateDictTensor]:
    """Yield the tensors of a file, as views, that a tensor is made of."""
    if isinstance(tensor.source, Joined):
        for part in parts_with_elements(tensor.source):
            yield from leaves_of(part)
    else:
        yield tensor


def parts_with_elements(joined: Joined) -> Iterable[StateDictTensor]:
    """Return the parts of a tensor without empty ones; the first if all are empty."""
    return [part for part in joined.parts if part.elements] or joined.parts[:1]


__all__ = ["Held", "OldParameters", "Origin", "held_of", "leaves_of", "parts_with_elements"]
