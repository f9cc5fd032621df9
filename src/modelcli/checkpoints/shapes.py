"""Shapes and strides as files state them: checked here, for every format, before anything is computed from them."""

from __future__ import annotations

from math import prod

from modelcli.checkpoints import limits
from modelcli.model.tensors import Shape

_END = 2**63
_SEQUENCES = (tuple, list)
#: A file may have 100,000 tensors, and hardly one has more dimensions: no limit on them is looked up for these.
_USUAL = 4


def sizes(value: object, what: str) -> Shape:
    """A shape, stride or offset as a tuple of numbers from 0 to below 2^63, no more of them than the limit.

    Raises ValueError for anything else, and FileFormatError, with `what` for a subject, for too many.
    """
    if not isinstance(value, _SEQUENCES):
        raise ValueError("what should be a shape is none")
    if len(value) > _USUAL:
        limits.DIMENSIONS.check(len(value), what)
    for size in value:
        if type(size) is not int or not 0 <= size < _END:
            raise ValueError("what should be a shape is none: a size is not a whole number below 2^63")
    return tuple(value)


def shape(value: object, what: str) -> Shape:
    """A shape of fewer than 2^63 elements; an axis of none counts as one of one. Raises as `sizes` does.

    ValueError names no file: a reader turns it into a FileFormatError that does.
    """
    found = sizes(value, what)
    elements = prod(found) if 0 not in found else prod(size or 1 for size in found)
    if elements >= _END:
        raise ValueError(f"a tensor of more elements than there can be: shape {list(found)}")
    return found


def extent(shape: Shape, stride: Shape) -> int:
    """How many elements of a storage a view spans from its first to its last; 0 for an empty one.

    Raises ValueError where the two have not as many axes.
    """
    if len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {list(shape)} and stride {list(stride)}")
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def is_row_major(shape: Shape, stride: Shape) -> bool:
    """Whether a tensor is contiguous: its elements lie one after another."""
    if 0 in shape:
        return True
    return all(size == 1 or step == by for size, step, by in zip(shape, stride, row_major(shape), strict=True))


def row_major(shape: Shape) -> Shape:
    """The strides, in elements, of a contiguous tensor."""
    if len(shape) == 2:  # the commonest first: a checkpoint may have 100,000
        return (shape[1] or 1, 1)
    if len(shape) < 2:
        return (1,) * len(shape)
    stride = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * max(shape[axis + 1], 1)
    return tuple(stride)
