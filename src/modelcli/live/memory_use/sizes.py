"""Give the inputs of a model another batch size or, for language models, another length."""

from __future__ import annotations

import math
from dataclasses import replace

from modelcli.errors import RequestError
from modelcli.live.inputs import Inputs
from modelcli.wording import listed

#: The inputs that hold tokens, in the order in which one decides how long the input is.
_TOKENS = ("input_ids", "decoder_input_ids")


#: The most elements of an input: torch counts bytes in 63 bits.
_MOST_ELEMENTS = 2**59


def _required_possible(inputs: Inputs, option: str) -> Inputs:
    """Return the inputs. Raises RequestError if torch can make no tensor of such a size."""
    for shape in inputs.all_shapes:
        if math.prod(shape) > _MOST_ELEMENTS:
            raise RequestError(
                f"{option} gives an input of {list(shape)}, which no tensor can hold", "pass a smaller one"
            )
    return inputs


def batch_of(inputs: Inputs) -> int | None:
    """Return the batch size: the first dimension of the first tensor. None if there is no such dimension."""
    return next((shape[0] for shape in inputs.all_shapes if shape), None)


def with_batch(inputs: Inputs, batch: int) -> Inputs:
    """Return the inputs with another batch size. Tensors whose first dimension is not the old one stay as they are.

    Raises RequestError if the inputs have no batch dimension.
    """
    old = batch_of(inputs)
    if old is None or inputs.as_list:
        raise RequestError(
            "the inputs have no batch dimension that --batch could change",
            "state the inputs with --input-size or --input, batch included",
        )

    def changed(shape: tuple[int, ...]) -> tuple[int, ...]:
        has_batch = bool(shape) and shape[0] == old and (len(shape) > 1 or old > 1 or len(inputs.all_shapes) == 1)
        return (batch, *shape[1:]) if has_batch else shape

    named = tuple(item if item.shape is None else replace(item, shape=changed(item.shape)) for item in inputs.named)
    changed_inputs = replace(inputs, shapes=tuple(map(changed, inputs.shapes)), named=named)
    return _required_possible(changed_inputs, f"--batch {batch}")


def with_context(inputs: Inputs, length: int) -> Inputs:
    """Return the inputs of a language model with another number of tokens.

    Raises RequestError if the model takes no tokens.
    """
    shapes = {item.path[0]: item.shape for item in inputs.named if item.shape is not None and len(item.path) == 1}
    lengths = {shapes[name][1] for name in _TOKENS if name in shapes and len(shapes[name]) == 2}
    if not lengths:
        takes = listed(list(shapes), 8) if shapes else "no named tensor"
        raise RequestError(
            f"--context is for models that take tokens as input_ids, and this one takes {takes}",
            "state the size of its input with --input-size or --input",
        )
    named = tuple(
        replace(item, shape=(item.shape[0], length, *item.shape[2:]))
        if item.shape is not None and len(item.shape) >= 2 and item.shape[1] in lengths
        else item
        for item in inputs.named
    )
    return _required_possible(replace(inputs, named=named), f"--context {length}")
