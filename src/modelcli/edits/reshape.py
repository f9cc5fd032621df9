"""reshape: give tensors of a state dict another shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Self

from modelcli.edits import key_surgery
from modelcli.edits.applied import Applied, Context
from modelcli.edits.declaring import TENSORS, Operand, selector
from modelcli.edits.key_surgery import Match, Result
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.model.strides import is_row_major, row_major
from modelcli.model.tensors import Shape

#: The most axes that PyTorch's operations support.
MAX_AXES = 64
_EXAMPLE = "reshape '**.qkv.weight' 3,-1,64"


@dataclass(frozen=True, kw_only=True)
class Reshape(Selecting):
    """Give what matches another shape with as many elements, in row-major order. One size may be -1."""

    targets: tuple[str, ...]
    shape: tuple[int, ...]

    name: ClassVar[str] = "reshape"
    summary: ClassVar[str] = "Give tensors of a state dict another shape with as many elements."
    effect: ClassVar[str] = (
        "gives the matching tensors of a state dict another shape with as many elements, in the same row-major order; "
        "one size may be `-1`, and then follows from the others"
    )
    in_pytorch: ClassVar[str] = "`state[key].reshape(3, -1, 64)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli reshape fc.weight 1000,512,1,1 -m best.pth --bare-keys -o conv.pth",
        "modelcli reshape '**.weight' 3,-1,1 -m bare.pth",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Selectors of tensors, then the new shape: 3,-1,64; one that begins with -1 stands behind --.",
            "TARGET... SHAPE",
            several=True,
            completes=(TENSORS,),
            completes_later=(TENSORS,),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("squeeze", "unsqueeze", "flatten")
    handler: ClassVar[str] = "modelcli.live.surgery.reshape"

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("reshape takes at least one target and a shape", _EXAMPLE)
        shape = key_surgery.numbers_of(words[-1], "sizes", _EXAMPLE, least=-1)
        if len(shape) > MAX_AXES:
            raise RequestError(f"a shape of {len(shape)} axes; the limit is {MAX_AXES}, as in PyTorch", _EXAMPLE)
        if shape.count(-1) > 1:
            raise RequestError(f"{words[-1]} leaves more than one size open", "-1 may stand in a shape once")
        return cls(targets=tuple(map(selector, words[:-1])), shape=shape)

    def operands(self) -> list[str]:
        return [*self.targets, key_surgery.numbers_text(self.shape)]

    def matches(self, model: StateDictModel) -> list[Match]:
        """Return each tensor to change; it keeps its name."""
        return key_surgery.picked(self, model)[0]

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        matches, notes = key_surgery.picked(self, model)
        return key_surgery.carried_out(self, model, matches, self._reshaped, context, notes)

    def _reshaped(self, match: Match, tensors: Sequence[StateDictTensor]) -> list[Result]:
        (tensor,) = tensors
        shape = self._shape_of(match.old[0], tensor)
        if is_row_major(tensor.shape or (), tensor.stride):
            tensor = replace(tensor, shape=shape, stride=row_major(shape))
        return [Result([tensor], shape=shape)]

    def _shape_of(self, name: str, tensor: StateDictTensor) -> Shape:
        """Return the new shape of a tensor. Raises RequestError if it has another number of elements."""
        others = prod(size for size in self.shape if size >= 0)
        text, own = key_surgery.numbers_text(self.shape), list(tensor.shape or ())
        if -1 not in self.shape:
            if others != tensor.elements:
                raise RequestError(
                    f"{name} has the shape {own}, which are {tensor.elements:,} elements, and {text} has {others:,}",
                    "-1 stands for the size that follows from the others",
                )
            return self.shape
        if not others or tensor.elements % others:
            raise RequestError(
                f"{name} has the shape {own}, and its {tensor.elements:,} elements do not fit into {text}: they are no "
                f"multiple of {others:,}",
                "the product of the sizes has to be the number of elements",
            )
        return tuple(tensor.elements // others if size < 0 else size for size in self.shape)
