"""Tensors of a state-dict model that are made of the elements of others, as plain data: nothing is read for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.state_dict import StateDictTensor
from modelcli.model.strides import row_major
from modelcli.model.tensors import Shape


class Place(NamedTuple):
    """Where a tensor that is made of others stands among the keys: in the place of the first of these.

    Attributes:
        identity: the identity of the first tensor as it is in the file, if it is.
        name: the key of that tensor when it was used; a tied one has several.
        numbers: the number of the new tensor among those that take that place. Each later edit that takes it apart adds
            another number.
    """

    identity: int
    name: str
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Joined:
    """The elements of tensors of one dtype, joined along an axis and laid out in row-major order.

    Two of them are equal, and so count as the same bytes, only if they have the same `token`.

    Attributes:
        parts: the tensors. They have the same shape except for the size of the axis.
        dim: the axis, from 0.
        place: where its tensor stands among the keys.
        token: an object that tensors which are tied have in common.
    """

    parts: tuple[StateDictTensor, ...] = field(compare=False)
    dim: int = field(compare=False)
    place: Place = field(compare=False)
    token: object = field(default_factory=object)

    @property
    def nbytes(self) -> int:
        return sum(part.elements for part in self.parts) * ITEM_BYTES[self.parts[0].dtype]


def joined_shape(parts: Sequence[StateDictTensor], dim: int) -> Shape:
    """Return the shape of these tensors joined along an axis."""
    first = parts[0].shape
    assert first is not None
    return (*first[:dim], sum(part.shape[dim] for part in parts if part.shape is not None), *first[dim + 1 :])


def made_of(
    parts: Sequence[StateDictTensor], dim: int, identity: int, place: Place, shape: Shape | None = None
) -> StateDictTensor:
    """Return a new tensor with the elements of others. It shares no bytes with them.

    It is a parameter if one of them is, and its flag is that of the parameters among them, if these agree.

    Args:
        parts: the others, of one dtype.
        dim: the axis along which they are joined.
        identity: the number of the new tensor.
        place: where it stands among the keys.
        shape: its shape if that is not theirs joined; it has as many elements.
    """
    first = parts[0]
    if len(parts) > 1 or shape is None:
        shape = joined_shape(parts, dim) if parts[0].shape else (first.shape or ())
    cast_from = first.cast_from if len({part.cast_from for part in parts}) == 1 else ()
    if cast_from:  # values that a cast loses are then counted in the new tensor, as in any other
        parts = [replace(part, dtype=cast_from[0], cast_from=()) for part in parts]
    flags = {part.requires_grad for part in parts if part.kind == "parameter"}
    made = StateDictTensor(
        identity,
        shape,
        first.dtype,
        row_major(shape),
        0,
        Joined(tuple(parts), dim, place),
        "parameter" if flags else "buffer",
        next(iter(flags)) if len(flags) == 1 else None,
        all(part.persistent for part in parts),
        cast_from,
    )
    assert made.storage_bytes == prod(shape) * ITEM_BYTES[first.dtype]
    return made


def seen_through(tensor: StateDictTensor) -> StateDictTensor:
    """Return the tensor as a view of the source of its only part, if it has one part and that part's shape."""
    source = tensor.source
    if not isinstance(source, Joined) or len(source.parts) > 1 or tensor.copied:
        return tensor
    part = source.parts[0]
    if (tensor.shape, tensor.stride, tensor.offset) != (part.shape, row_major(part.shape or ()), 0):
        return tensor
    return replace(
        tensor,
        stride=part.stride,
        offset=part.offset,
        source=part.source,
        cast_from=(*part.cast_from, *tensor.cast_from),
        copied=part.copied,
    )


def tied_at(tensor: StateDictTensor, place: Place) -> StateDictTensor:
    """Return a tensor that `made_of` made, for another name of it that stands at another place."""
    assert isinstance(tensor.source, Joined)
    return replace(tensor, source=replace(tensor.source, place=place))


def place_of(name: str, tensor: StateDictTensor) -> Place:
    """Return where a tensor of this key stands among the keys."""
    return tensor.source.place if isinstance(tensor.source, Joined) else Place(tensor.identity, name)


def casts_in(tensor: StateDictTensor) -> Iterator[StateDictTensor]:
    """Yield the tensor if it was cast, and those of the tensors that it is made of which were cast before that."""
    if tensor.cast_from and tensor.source is not None:
        yield tensor
    if isinstance(tensor.source, Joined):
        for part in tensor.source.parts:
            yield from casts_in(part)
