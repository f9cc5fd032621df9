"""What a model is known to take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Inputs:
    """What a model is known to take: a shape for each input, batch included, and their dtypes where someone said so.

    Where nobody did, inputs are `floating`, the model's own floating-point dtype. With `as_list` the one input is a
    list of images, as torchvision's detection models take it.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = ()
    as_list: bool = False
    floating: str = "float32"

    def with_floating(self, dtype: str) -> Inputs:
        """What the model takes when its own dtype is another: inputs that were stated to be of the old one are, too."""
        stated = tuple(dtype if name == self.floating else name for name in self.dtypes)
        return replace(self, dtypes=stated, floating=dtype)

    def tensors(self, device: str) -> list[Any]:
        """Inputs of these shapes: on meta, or drawn from a normal distribution (whole numbers: zeros)."""
        made: list[Any] = []
        for index, shape in enumerate(self.shapes):
            name = self.dtypes[min(index, len(self.dtypes) - 1)] if self.dtypes else self.floating
            dtype = getattr(torch, name)
            if device == "meta" or not dtype.is_floating_point:
                made.append(torch.zeros(shape, dtype=dtype, device=device))
            else:
                made.append(torch.randn(shape, device=device).to(dtype))
        return [made] if self.as_list else made
