"""Weights of a state-dict model times their scales, as plain data: nothing is read for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.state_dict import StateDictTensor
from modelcli.model.tensors import Shape

#: The dtype of the products, before they are rounded to another.
PRODUCTS = "float32"


@dataclass(frozen=True, slots=True)
class Dequantized:
    """The elements of a weight, each times the scale of its block, as float32 in row-major order.

    Two of them are equal, and so count as the same bytes, only if they have the same `token`.

    Attributes:
        weight: the weight as it is stored, of one or more axes.
        scale: its scales.
        block: the rows and columns that have one scale, in the last two axes of the weight; those at the end of an axis
            may have fewer. None if one scale is for all elements.
        token: an object that tensors which are tied have in common.
    """

    weight: StateDictTensor = field(compare=False)
    scale: StateDictTensor = field(compare=False)
    block: tuple[int, int] | None = field(compare=False)
    token: object = field(default_factory=object)

    @property
    def nbytes(self) -> int:
        return self.weight.elements * ITEM_BYTES[PRODUCTS]


class NoBlockSizeError(Exception):
    """The shapes of a weight and its scales give no block size, or several. The text says which."""


def block_of(shape: Shape, scale: Shape, stated: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the rows and columns of a weight that have one scale; None if all of its elements have one.

    A scale with one element is for the whole weight. Else its last two axes count blocks of the last two axes of the
    weight, and their other axes agree; one of a single axis has a scale for each row of a matrix. A stated block is
    taken if its number fits. Without one, an axis has blocks of the whole axis, of one element, of the size that
    divides it evenly, or of a power of two with a part of a block at the end; if two of these fit, the size is unknown.

    Args:
        shape: the shape of the weight.
        scale: the shape of its scales.
        stated: the block size that the configuration or the user states.

    Raises NoBlockSizeError if no block size fits, or if several do.
    """
    if prod(scale) == 1:
        return None
    grid = (*scale, 1) if len(scale) == 1 and len(shape) == 2 else scale
    if len(shape) < 2 or len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        raise NoBlockSizeError("the axes of the two do not fit")
    if stated is not None and all(-(-size // own) == count for size, count, own in zip(shape[-2:], grid[-2:], stated)):  # noqa: B905
        return stated
    rows, columns = (_whole_or_single(size, count) for size, count in zip(shape[-2:], grid[-2:], strict=True))
    if (rows is None or columns is None) and stated is not None:
        wanted = [-(-size // own) for size, own in zip(shape[-2:], stated, strict=True)]
        raise NoBlockSizeError(f"blocks of {stated[0]}x{stated[1]} need {wanted[0]}x{wanted[1]} scales")
    return rows or _size_by_shape(shape[-2], grid[-2]), columns or _size_by_shape(shape[-1], grid[-1])


def _whole_or_single(size: int, count: int) -> int | None:
    """Return the size of blocks of which an axis has one, or as many as elements; None for any other number."""
    if count == size:
        return 1
    return size if count == 1 and size else None


def _size_by_shape(size: int, count: int) -> int:
    """Return the only usual size of `count` blocks, at least two, of which an axis of `size` elements consists."""
    least, most = (-(-size // count), (size - 1) // (count - 1)) if 1 < count < size else (1, 0)
    if least > most:
        raise NoBlockSizeError(f"no block size makes {count} blocks of {size} elements")
    power = 1 << (least - 1).bit_length()
    found = {least} if least == most or size % count == 0 else set()
    found |= {power} if power <= most else set()
    if len(found) != 1:
        raise NoBlockSizeError(f"{count} blocks of {size} elements may have from {least} to {most} elements each")
    return found.pop()
