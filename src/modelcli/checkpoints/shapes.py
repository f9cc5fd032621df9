"""Check the shapes and strides that files state, for all formats, before anything is computed from them."""

from __future__ import annotations

from math import prod
from operator import mul

from modelcli.checkpoints import limits
from modelcli.model.strides import is_row_major, row_major
from modelcli.model.tensors import Shape
from modelcli.wording import brief_repr

_END = 2**63
_SEQUENCES = (tuple, list)
#: Up to this many dimensions the limit is not checked, for speed: a file may have 100,000 tensors.
_USUAL = 4


def sizes(value: object, what: str) -> Shape:
    """Check and return a shape, stride or offset: a tuple of integers from 0 to 2^63 - 1.

    Raises:
        ValueError: the value is anything else.
        FileFormatError: there are more integers than the limit; the message starts with `what`.
    """
    if not isinstance(value, _SEQUENCES):
        raise ValueError(f"a shape or stride should be a list of sizes, but is a {type(value).__name__}")
    if len(value) > _USUAL:
        limits.DIMENSIONS.check(len(value), what)
    for size in value:
        if type(size) is not int or not 0 <= size < _END:
            raise ValueError(f"a size or stride is {brief_repr(size)}, which is not a whole number from 0 to 2^63 - 1")
    return tuple(value)


def shape(value: object, what: str) -> Shape:
    """Check and return a shape of fewer than 2^63 elements, where an empty axis counts as one element.

    Raises as `sizes` does. A ValueError does not name the file; the reader makes a FileFormatError of it.
    """
    found = sizes(value, what)
    elements = prod(found) if 0 not in found else prod(size or 1 for size in found)
    if elements >= _END:
        raise ValueError(f"the shape {list(found)} has 2^63 or more elements")
    return found


def extent(shape: Shape, stride: Shape) -> int:
    """Return the number of elements of a storage from the first to the last of a view; 0 for an empty view.

    Raises ValueError if shape and stride differ in length.
    """
    if len(shape) != len(stride):
        raise ValueError(f"the shape {list(shape)} and the stride {list(stride)} of a tensor differ in length")
    if 0 in shape:
        return 0
    reach: int = sum(map(mul, shape, stride))
    return 1 + reach - sum(stride)


__all__ = ["extent", "is_row_major", "row_major", "shape", "sizes"]
