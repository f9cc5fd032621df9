"""What a model is known to take, as data: shapes, dtypes and named inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from modelcli.language import input_texts
from modelcli.language.input_texts import InputText


@dataclass(frozen=True)
class StatedInputs:
    """What a model is known to take: a shape for each input, batch included, and their dtypes where someone said so.

    Where nobody did, inputs are `floating`, the model's own floating-point dtype. With `as_list` the one input is a
    list of images, as models that detect objects take it. `named` are inputs that are stated by the name of their
    argument, or are no tensors; they come after those of `shapes`. `tuples` are the arguments, by name or position,
    whose items make a tuple and not a list.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = ()
    as_list: bool = False
    floating: str = "float32"
    named: tuple[InputText, ...] = ()
    tuples: frozenset[str] = frozenset()

    @property
    def all_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each tensor, in the order in which they are stated."""
        return (*self.shapes, *(item.shape for item in self.named if item.shape is not None))

    @property
    def texts(self) -> tuple[str, ...]:
        """The inputs that are stated otherwise than by shapes alone, as `input_texts` reads them."""
        if not self.shapes and not self.named:
            return (input_texts.NONE,)
        return tuple(map(str, self.named))

    def with_floating(self, dtype: str) -> Self:
        """What the model takes when its own dtype is another: inputs that were stated to be of the old one are, too."""
        stated = tuple(dtype if name == self.floating else name for name in self.dtypes)
        named = tuple(replace(item, dtype=dtype) if item.dtype == self.floating else item for item in self.named)
        return replace(self, dtypes=stated, floating=dtype, named=named)
