"""Arrange tensors of an optimizer's state as an edited parameter is arranged, without reading them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from modelcli.checkpoints.entries import TensorEntry
from modelcli.model.joined_tensors import Joined, Place
from modelcli.model.parameter_origins import OldParameters, parts_with_elements
from modelcli.model.state_dict import StateDictTensor
from modelcli.model.strides import row_major
from modelcli.model.tensors import Shape
from modelcli.values.state_dict_sources import Sources

_NOWHERE = Place(-1, "")


class CannotArrangeError(Exception):
    """Tensors of the state cannot be arranged as their parameters were. Its text is the reason."""


def arranged(
    made: StateDictTensor, state: Mapping[str, TensorEntry], old: OldParameters, sources: Sources
) -> TensorEntry:
    """Return the state of a parameter that is made of the elements of old ones.

    Args:
        made: the parameter.
        state: for each old parameter that it is made of, a tensor of its state, which has its shape.
        old: the parameters of the model as it was opened.
        sources: gives the bytes of the result.

    Raises CannotArrangeError for state of several dtypes, and for a parameter whose elements are not side by side.
    """

    def of_leaf(part: StateDictTensor) -> StateDictTensor:
        name = old.leaf(part)
        parameter = None if name is None else old.opened[name].tensor
        if name is None or parameter is None:
            raise CannotArrangeError("where its parts come from is not known")
        return _as_part(part, parameter, state[name])

    return sources.entry("the state", _substituted(made, of_leaf))


def _substituted(tensor: StateDictTensor, of_leaf: Callable[[StateDictTensor], StateDictTensor]) -> StateDictTensor:
    """Return a tensor with other tensors in the places of those that it is made of."""
    if not isinstance(tensor.source, Joined):
        return of_leaf(tensor)
    parts = tuple(_substituted(part, of_leaf) for part in parts_with_elements(tensor.source))
    dtypes = sorted({part.dtype for part in parts})
    if len(dtypes) > 1:
        raise CannotArrangeError(f"it is {' and '.join(dtypes)} in its parts")
    joined = Joined(parts, tensor.source.dim, _NOWHERE)
    return replace(tensor, source=joined, dtype=dtypes[0], cast_from=())


def _as_part(part: StateDictTensor, parameter: StateDictTensor, state: TensorEntry) -> StateDictTensor:
    """Return the elements of a parameter's state that correspond to a part of the parameter."""
    source, first = state.storage, state.offset
    if not _is_laid_out_alike(parameter.shape or (), parameter.stride, state.stride):
        order = sorted(range(len(state.shape)), key=lambda axis: (-parameter.stride[axis], -state.shape[axis]))
        shape = tuple(state.shape[axis] for axis in order)
        strides = dict(zip(order, row_major(shape), strict=True))
        if not _is_laid_out_alike(state.shape, parameter.stride, tuple(map(strides.__getitem__, range(len(shape))))):
            raise CannotArrangeError("its elements are not side by side in the file")
        whole = replace(
            parameter,
            shape=shape,
            dtype=state.dtype,
            stride=tuple(state.stride[axis] for axis in order),
            offset=state.offset,
            source=state.storage,
            cast_from=(),
            copied=0,
        )
        laid_out = Joined((whole,), 0, _NOWHERE)
        return replace(
            part, dtype=state.dtype, source=laid_out, offset=part.offset - parameter.offset, cast_from=(), copied=0
        )
    offset = part.offset - parameter.offset + first
    return replace(part, dtype=state.dtype, source=source, offset=offset, cast_from=(), copied=0)


def _is_laid_out_alike(shape: Shape, stride: Shape, other: Shape) -> bool:
    """Whether two tensors of a shape have their elements in the same places; an axis of one element does not count."""
    return all(size == 1 or one == two for size, one, two in zip(shape, stride, other, strict=True))


__all__ = ["CannotArrangeError", "arranged"]
