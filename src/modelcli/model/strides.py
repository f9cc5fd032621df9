"""The strides of contiguous tensors, in elements."""

from __future__ import annotations

from modelcli.model.tensors import Shape


def is_row_major(shape: Shape, stride: Shape) -> bool:
    """Whether a tensor is contiguous: its elements are one after another in row-major order."""
    if 0 in shape:
        return True
    return all(size == 1 or step == by for size, step, by in zip(shape, stride, row_major(shape), strict=True))


def row_major(shape: Shape) -> Shape:
    """Return the strides, in elements, of a contiguous tensor of a shape."""
    if len(shape) == 2:  # the most frequent case first, because a checkpoint may have 100,000 tensors
        return (shape[1] or 1, 1)
    if len(shape) < 2:
        return (1,) * len(shape)
    stride = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * max(shape[axis + 1], 1)
    return tuple(stride)
