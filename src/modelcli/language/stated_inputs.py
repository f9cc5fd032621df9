"""The known inputs of a model as plain data: shapes, dtypes and named inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from modelcli.language import input_texts
from modelcli.language.input_texts import InputText


@dataclass(frozen=True)
class StatedInputs:
    """The known inputs of a model.

    Attributes:
        shapes: the shapes of the positional inputs, batch included.
        dtypes: the stated dtypes; the last one holds for the remaining inputs.
        as_list: whether the one input is a list of images, as for detection models.
        floating: the model's own floating-point dtype, for inputs without a stated dtype.
        named: the inputs that are stated by name or are not tensors; they come after `shapes`.
        tuples: the arguments, by name or position, whose items form a tuple instead of a list.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = ()
    as_list: bool = False
    floating: str = "float32"
    named: tuple[InputText, ...] = ()
    tuples: frozenset[str] = frozenset()

    @property
    def all_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each input tensor, in the stated order."""
        return (*self.shapes, *(item.shape for item in self.named if item.shape is not None))

    @property
    def texts(self) -> tuple[str, ...]:
        """The inputs other than `shapes`, as texts that `input_texts` parses."""
        if not self.shapes and not self.named:
            return (input_texts.NONE,)
        return tuple(map(str, self.named))

    def with_floating(self, dtype: str) -> Self:
        """Return the inputs for the model cast to `dtype`. Inputs stated in the model's old dtype change with it."""
        stated = tuple(dtype if name == self.floating else name for name in self.dtypes)
        named = tuple(replace(item, dtype=dtype) if item.dtype == self.floating else item for item in self.named)
        return replace(self, dtypes=stated, floating=dtype, named=named)
